"""Conversations -> examples in which every assistant turn is learned once, as serving will ask for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from tunesmith.data.report import DataReport, Kind, reasons
from tunesmith.data.template import ChatTemplate, Rendered
from tunesmith.data.tokenize import Text, TextEncoder, Tokens
from tunesmith.data.truncate import Truncation, head_of, keep_end, parts_of
from tunesmith.errors import DataError, TemplateError
from tunesmith.types import IGNORE_INDEX, Conversation, Example, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 1000
_SEVERAL = "the template shows earlier turns otherwise than when they were the last; each is learned in its own rendering"
_JOINED = "a token joins the prompt and the beginning of a reply; it is not learned"
_GUARDED = "the text spells a special token, which is read as ordinary text"


def preprocess_data(
    conversations: Iterable[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    cutoff_len: int,
    report: DataReport,
    date: str | None = None,
    truncation: Truncation = "keep_end",
) -> list[Example]:
    """Render, tokenise and mask conversations for supervised fine-tuning.

    A row whose template rewrites earlier turns (reasoning that is dropped later) becomes several examples, so that each
    turn is learned as serving will ask for it. What is left out, cut or remarkable goes to ``report``.

    Args:
        conversations: in order.
        tokenizer: with a chat template.
        cutoff_len: tokens of the longest example.
        report: the account.
        date: what the template takes for today.
        truncation: what becomes of longer rows.

    Raises:
        DataError: no row is left.
        TemplateError: the tokenizer has no usable chat template.
    """
    maker = _Maker(ChatTemplate(tokenizer, date), TextEncoder(tokenizer), cutoff_len, truncation, report)
    examples: list[Example] = []
    stream = iter(conversations)
    while chunk := list(islice(stream, _CHUNK)):
        examples.extend(maker.chunk(chunk))
    if not examples:
        raise DataError("no trainable tokens in any row:\n  " + reasons(report.of("unreadable", "uncertified", "dropped")))
    return examples


class _Maker:
    def __init__(
        self, template: ChatTemplate, encoder: TextEncoder, cutoff_len: int, truncation: Truncation, report: DataReport
    ) -> None:
        self.template = template
        self.encoder = encoder
        self.cutoff_len = cutoff_len
        self.truncation = truncation
        self.report = report

    def chunk(self, conversations: Sequence[Conversation]) -> Iterator[Example]:
        """Examples of many rows, tokenised together."""
        rows: list[tuple[Conversation, list[Rendered]]] = []
        for conversation in conversations:
            try:
                rows.append((conversation, self.template.views(conversation.messages, conversation.tools)))
            except TemplateError as error:
                fix = "Mend the row, or use a template that can show it."
                self.report.add("uncertified", "uncertified", str(error), conversation.source, fix)
        tokens = iter(self.encoder.encode([_text(view) for _, views in rows for view in views]))
        for conversation, views in rows:
            yield from self._row(conversation, views, [next(tokens) for _ in views])

    def _row(self, conversation: Conversation, views: Sequence[Rendered], tokens: Sequence[Tokens]) -> list[Example]:
        self._remark(conversation, views, tokens)
        examples = [_example(conversation, view, made) for view, made in zip(views, tokens, strict=True)]
        if any(len(example) > self.cutoff_len for example in examples):
            examples = self._shorten(conversation, examples)
            if not examples:
                return []
        learned = [example for example in examples if count_supervised(example.labels)]
        if not learned:
            self._left_out(conversation, "nothing-to-learn", "no trainable token")
            return []
        self.report.kept += 1
        self.report.tokens += sum(map(len, learned))
        self.report.supervised += sum(count_supervised(example.labels) for example in learned)
        return learned

    def _remark(self, conversation: Conversation, views: Sequence[Rendered], tokens: Sequence[Tokens]) -> None:
        remarks = dict.fromkeys(note for view in views for note in view.notes)
        remarks |= {_SEVERAL: None} if len(views) > 1 else {}
        remarks |= {_JOINED: None} if any(made.joined for made in tokens) else {}
        remarks |= {_GUARDED: None} if any(made.guarded for made in tokens) else {}
        for remark in remarks:
            self.report.add("note", "template", remark, conversation.source)

    # ---- rows that are too long

    def _shorten(self, conversation: Conversation, examples: list[Example]) -> list[Example]:
        """What is learned of a row of which some example is too long; the row is counted as cut or as left out."""
        limit, longest = self.cutoff_len, max(map(len, examples))
        if self.truncation in ("error", "drop"):
            message = f"longer than cutoff_len {limit}"
            kind: Kind = "uncertified" if self.truncation == "error" else "dropped"
            fix = f"Raise cutoff_len to {longest}, or choose another truncation." if kind == "uncertified" else ""
            self.report.add(kind, "too-long", message, conversation.source, fix)
            return []
        if self.truncation == "keep_end":
            shortened = self._keep_end(conversation, examples)
            how = "oldest turns, or the head of the question, left out"
        elif self.truncation == "keep_start":
            shortened = [example if len(example) <= limit else head_of(example, limit) for example in examples]
            how = "end cut off and not learned"
        else:
            shortened = [part for example in examples for part in parts_of(example, limit)]
            how = "split into several"
        learned = [example for example in shortened if count_supervised(example.labels)]
        if not learned:
            why = "the answer alone is too long" if self.truncation == "keep_end" else "no answer token is left"
            self._left_out(conversation, "too-long", f"longer than cutoff_len {limit}, and {why}")
            return []
        self.report.add("cut", "truncated", f"longer than cutoff_len {limit}: {how}", conversation.source)
        return learned

    def _keep_end(self, conversation: Conversation, examples: list[Example]) -> list[Example]:
        if all(len(example) <= self.cutoff_len for example in examples):
            return examples

        def fits(messages: tuple[Message, ...]) -> bool:
            made = self._encode(replace(conversation, messages=messages))
            return made is not None and all(len(example) <= self.cutoff_len for example in made)

        messages = keep_end(conversation.messages, fits)
        return [] if messages is None else self._encode(replace(conversation, messages=messages)) or []

    def _encode(self, conversation: Conversation) -> list[Example] | None:
        """Examples of one row; None where the template refuses it."""
        try:
            views = self.template.views(conversation.messages, conversation.tools)
        except TemplateError:
            return None
        tokens = self.encoder.encode([_text(view) for view in views])
        return [_example(conversation, view, made) for view, made in zip(views, tokens, strict=True)]

    def _left_out(self, conversation: Conversation, code: str, message: str) -> None:
        self.report.add("dropped", code, message, conversation.source, "Raise cutoff_len, or shorten the row.")


def _text(view: Rendered) -> Text:
    return Text(view.text, tuple((turn.start, turn.end) for turn in view.turns), view.data)


def _example(conversation: Conversation, view: Rendered, tokens: Tokens) -> Example:
    """The tokens of a view with its labels, and the weights of its turns where they are not all 1."""
    labels = np.full(len(tokens.ids), IGNORE_INDEX, dtype=np.int32)
    factors = [conversation.messages[turn.index].weight for turn in view.turns]
    weights = None if all(factor == 1 for factor in factors) else np.ones(len(tokens.ids), dtype=np.float32)
    for (begin, end), factor in zip(tokens.spans, factors, strict=True):
        labels[begin:end] = tokens.ids[begin:end]
        if weights is not None:
            weights[begin:end] = factor
    return Example(tokens.ids, labels, conversation.source, weights)


def count_supervised(labels: np.ndarray) -> int:
    """Tokens that are learned: supervised ones, the first of the row excepted (nothing predicts it)."""
    return int((labels[1:] != IGNORE_INDEX).sum())

"""Conversations -> examples in which every assistant turn is learned once, as serving will ask for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

from tunesmith.data.learned import Learned
from tunesmith.data.report import DataReport, Kind, reasons
from tunesmith.data.template import ChatTemplate, Rendered
from tunesmith.data.tokenize import Text, TextEncoder, Tokens
from tunesmith.data.truncate import Truncation, keep_end
from tunesmith.errors import DataError, TemplateError
from tunesmith.types import Conversation, Example, Message

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
    """Render, tokenise and mask conversations for supervised fine-tuning, in memory.

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
    maker = ConversationMaker(ChatTemplate(tokenizer, date), TextEncoder(tokenizer), cutoff_len, truncation)
    examples: list[Example] = []
    stream = iter(conversations)
    while chunk := list(islice(stream, _CHUNK)):
        rendered = [maker.render(conversation, report) for conversation in chunk]
        examples += [row.example() for row in maker.finish([r for r in rendered if r is not None], report)]
    if not examples:
        raise DataError("no trainable tokens in any row:\n  " + reasons(report.of("unreadable", "uncertified", "dropped")))
    return examples


Rendering = tuple[Conversation, list[Rendered]]
"""A row and its views."""


class ConversationMaker:
    """Makes examples of conversations, in two steps: rendering, and tokenising with masks.

    Args:
        template: renders.
        encoder: tokenises.
        cutoff_len: tokens of the longest example.
        truncation: what becomes of longer rows.
    """

    def __init__(self, template: ChatTemplate, encoder: TextEncoder, cutoff_len: int, truncation: Truncation) -> None:
        self.template = template
        self.encoder = encoder
        self.cutoff_len = cutoff_len
        self.truncation = truncation

    def render(self, conversation: Conversation, report: DataReport) -> Rendering | None:
        """The views of a row; None, and counted, where they cannot be certified."""
        try:
            return conversation, self.template.views(conversation.messages, conversation.tools)
        except TemplateError as error:
            fix = "Mend the row, or use a template that can show it."
            report.add("uncertified", "uncertified", str(error), conversation.source, fix)
            return None

    def finish(self, rows: Sequence[Rendering], report: DataReport) -> list[Learned]:
        """Tokens and masks of many rows, tokenised together."""
        tokens = iter(self.encoder.encode([_text(view) for _, views in rows for view in views]))
        made: list[Learned] = []
        for conversation, views in rows:
            self._row(conversation, views, [next(tokens) for _ in views], report, made)
        return made

    def _row(
        self,
        conversation: Conversation,
        views: Sequence[Rendered],
        tokens: Sequence[Tokens],
        report: DataReport,
        made: list[Learned],
    ) -> None:
        self._remark(conversation, views, tokens, report)
        rows = [_learned(conversation, view, one) for view, one in zip(views, tokens, strict=True)]
        if any(len(row.ids) > self.cutoff_len for row in rows):
            rows = self._shorten(conversation, rows, report)
            if not rows:
                return
        counts = [row.supervised for row in rows]
        if not any(counts):
            _left_out(report, conversation, "nothing-to-learn", "no trainable token")
            return
        report.kept += 1
        report.supervised += sum(counts)
        for row, count in zip(rows, counts, strict=True):
            if count:
                report.tokens += len(row.ids)
                made.append(row)

    @staticmethod
    def _remark(conversation: Conversation, views: Sequence[Rendered], tokens: Sequence[Tokens], report: DataReport) -> None:
        remarks = [note for view in views for note in view.notes]
        remarks += [_SEVERAL] if len(views) > 1 else []
        for made in tokens:
            remarks += [_JOINED] if made.joined else []
            remarks += [_GUARDED] if made.guarded else []
        for remark in dict.fromkeys(remarks):
            report.add("note", "template", remark, conversation.source)

    # ---- rows that are too long

    def _shorten(self, conversation: Conversation, rows: list[Learned], report: DataReport) -> list[Learned]:
        """What is learned of a row of which some view is too long; the row is counted as cut or as left out."""
        limit, longest = self.cutoff_len, max(len(row.ids) for row in rows)
        if self.truncation in ("error", "drop"):
            kind: Kind = "uncertified" if self.truncation == "error" else "dropped"
            fix = f"Raise cutoff_len to {longest}, or choose another truncation." if kind == "uncertified" else ""
            report.add(kind, "too-long", f"longer than cutoff_len {limit}", conversation.source, fix)
            return []
        if self.truncation == "keep_end":
            shortened = self._keep_end(conversation)
            how = "oldest turns, or the head of the question, left out"
        elif self.truncation == "keep_start":
            shortened = [row.part(0, limit) for row in rows]
            how = "end cut off and not learned"
        else:
            shortened = [row.part(i, i + limit) for row in rows for i in range(0, len(row.ids), limit)]
            how = "split into several"
        learned = [row for row in shortened if row.supervised]
        if not learned:
            why = "the answer alone is too long" if self.truncation == "keep_end" else "no answer token is left"
            _left_out(report, conversation, "too-long", f"longer than cutoff_len {limit}, and {why}")
            return []
        report.add("cut", "truncated", f"longer than cutoff_len {limit}: {how}", conversation.source)
        return learned

    def _keep_end(self, conversation: Conversation) -> list[Learned]:
        def fits(messages: tuple[Message, ...]) -> bool:
            made = self._encode(replace(conversation, messages=messages))
            return made is not None and all(len(row.ids) <= self.cutoff_len for row in made)

        messages = keep_end(conversation.messages, fits)
        return [] if messages is None else self._encode(replace(conversation, messages=messages)) or []

    def _encode(self, conversation: Conversation) -> list[Learned] | None:
        """The views of one row; None where the template refuses it."""
        try:
            views = self.template.views(conversation.messages, conversation.tools)
        except TemplateError:
            return None
        tokens = self.encoder.encode([_text(view) for view in views])
        return [_learned(conversation, view, made) for view, made in zip(views, tokens, strict=True)]


def _left_out(report: DataReport, conversation: Conversation, code: str, message: str) -> None:
    report.add("dropped", code, message, conversation.source, "Raise cutoff_len, or shorten the row.")


def _text(view: Rendered) -> Text:
    return Text(view.text, tuple((turn.start, turn.end) for turn in view.turns), view.data)


def _learned(conversation: Conversation, view: Rendered, tokens: Tokens) -> Learned:
    messages = conversation.messages
    spans = zip(view.turns, tokens.spans, strict=True)
    learned = tuple((start, end, messages[turn.index].weight) for turn, (start, end) in spans)
    return Learned(tokens.ids, learned, conversation.source)

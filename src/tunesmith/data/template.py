"""The only place that turns messages into text and tokens, for training and for chat alike.

The tokenizer's own chat template renders the whole conversation once, with message texts that remember where their
characters come from (``data/trace.py``). So it is known, for any template, which characters are an assistant's turn.
A turn that is learned begins where the template, asked to prompt for it, stops, and includes the text with which the
template ends it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, takewhile
from typing import TYPE_CHECKING

import jinja2
import numpy as np

from tunesmith.data.tokenize import Text, TextEncoder
from tunesmith.data.trace import MARK, Span, TracedStr, TracedTemplate, trace
from tunesmith.errors import TemplateError
from tunesmith.types import IGNORE_INDEX, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = (Message("user", "Hello."), Message("assistant", "Good day."), Message("user", "Well?"))


@dataclass(frozen=True, slots=True)
class Rendered:
    """A rendered conversation.

    Attributes:
        text: what the model sees.
        spans: character ranges that are learned, disjoint and in order.
        notes: what a person should know: content that the template rewrites, a prompt that differs in chat.
        data: character ranges that come from messages; what they spell is never a special token.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    notes: tuple[str, ...] = ()
    data: tuple[tuple[int, int], ...] = ()


class ChatTemplate:
    """The chat template of one tokenizer.

    Args:
        tokenizer: with a chat template and a fast backend.
        date: ``YYYY-MM-DD`` that a template sees as today; the real one if None.

    Raises:
        TemplateError: no chat template, one that cannot be compiled, or no character offsets.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, date: str | None = None) -> None:
        self.tokenizer = tokenizer
        name = tokenizer.name_or_path
        if not tokenizer.chat_template:
            raise TemplateError(
                f"the tokenizer of {name!r} has no chat template; put a chat_template.jinja beside its tokenizer.json"
            )
        self._encoder = TextEncoder(tokenizer)
        try:
            self._template = TracedTemplate(tokenizer.get_chat_template(), date)
        except jinja2.TemplateError as error:
            raise TemplateError(f"the chat template of {name!r} cannot be read: {error}") from None
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()}
        longest_first = sorted(added, key=len, reverse=True)
        self._added_token = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> TracedStr:
        """Text of the conversation, equal to ``apply_chat_template``. Raises TemplateError when the template refuses it."""
        traced = [{"role": m.role, "content": trace(m.content, index)} for index, m in enumerate(messages)]
        try:
            return self._template.render(
                messages=traced,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.tokenizer.special_tokens_map,
            )
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ) as error:
            raise TemplateError(f"the chat template refuses the conversation: {error}") from None

    def render_supervised(self, messages: Sequence[Message]) -> Rendered:
        """Render and find the spans to learn: every assistant turn.

        Raises:
            TemplateError: the template refuses the conversation, or leaves out a turn, or does not end it.
        """
        text = self.render(messages)
        marked = [(span.start, span.end) for span in text.spans if span.origin == MARK]
        if marked:
            return Rendered(str.__str__(text), tuple(marked), data=_data(text))
        spans: list[tuple[int, int]] = []
        notes: list[str] = []
        for index, message in enumerate(messages):
            if message.role == "assistant":
                spans.append(self._turn(text, index, message, notes))
        if any(start < end for (_, end), (start, _) in pairwise(spans)):
            raise TemplateError("the template mixes the texts of several turns")
        return Rendered(str.__str__(text), tuple(spans), tuple(notes), _data(text))

    def _turn(self, text: TracedStr, index: int, message: Message, notes: list[str]) -> tuple[int, int]:
        own = [span for span in text.spans if span.origin == index]
        if not own:
            raise TemplateError(f"the template leaves out turn {index + 1}")
        first, last = own[0].start, own[-1].end
        if _content(text, own).strip() != message.content.strip():
            notes.append("the template rewrites or shortens an assistant turn; what it shows is learned")
        before = max((span.end for span in text.spans if span.end <= first and span.origin != index), default=0)
        after = min((span.start for span in text.spans if span.start >= last and span.origin != index), default=len(text))
        plain = str.__str__(text)
        start = before + self._reply_start(plain[before:first], notes)
        return start, last + self._turn_end(plain[last:after], index, after == len(text), notes)

    def _reply_start(self, gap: str, notes: list[str]) -> int:
        """Where in the text before a reply the prompt for it ends."""
        prompt = self.generation_prompt
        found = gap.rfind(prompt)
        if found >= 0:
            return found + len(prompt)
        for length in range(len(prompt) - 1, 0, -1):
            found = gap.rfind(prompt[:length])
            if found >= 0:
                kept = self._whole_tokens(prompt[:length], prompt)
                kept = self._whole_tokens(kept, gap[found:])
                tokens = list(self._added_token.finditer(kept))
                cut = max(kept.rfind("\n") + 1, tokens[-1].end() if tokens else 0)
                if cut:
                    notes.append(f"in chat the template opens replies with {prompt[cut:]!r}, these turns are opened otherwise")
                    return found + cut
        return len(gap)

    def _turn_end(self, tail: str, index: int, final: bool, notes: list[str]) -> int:
        """Length of what ends a turn, at the beginning of the text after its content."""
        ending = self._whole_tokens(_common_prefix(tail, self.turn_ending), tail)
        tokens = list(self._added_token.finditer(ending))
        if tokens:
            return tokens[-1].end()
        first = self._added_token.match(tail.lstrip())
        if first and first.group() != self.tokenizer.bos_token:
            return len(tail) - len(tail.lstrip()) + first.end()
        if ending.strip():
            return len(ending.rstrip())
        if not self.turn_ending.strip() and not self._ends_turns_midway:
            raise TemplateError(
                f"nothing ends turn {index + 1} in the chat template, so the model would never learn to stop; "
                "let the template put the end-of-turn token after every assistant turn"
            )
        notes.append(
            f"nothing ends {'the last turn' if final else 'a turn in the middle'} in the template; its end is not learned"
        )
        return 0

    def _whole_tokens(self, prefix: str, text: str) -> str:
        """``prefix`` of ``text``, shortened if it ends inside an added token of ``text``."""
        for token in self._added_token.finditer(text):
            if token.start() < len(prefix) < token.end():
                return prefix[: token.start()]
        return prefix

    def _tail(self, messages: Sequence[Message], origin: int, add_generation_prompt: bool = False) -> str:
        """Text after the content of a message, up to the next message's content."""
        text = self.render(messages, add_generation_prompt)
        end = max((span.end for span in text.spans if span.origin == origin), default=len(text))
        after = min((span.start for span in text.spans if span.start >= end and span.origin != origin), default=len(text))
        return str.__str__(text)[end:after]

    @cached_property
    def generation_prompt(self) -> str:
        """What the template appends when asked to prompt for a reply."""
        asked, unasked = self._tail(_PROBE[:1], 0, True), self._tail(_PROBE[:1], 0)
        return asked[len(self._whole_tokens(_common_prefix(asked, unasked), asked)) :]

    @cached_property
    def turn_ending(self) -> str:
        """What the template writes after the content of a final assistant turn."""
        ending = self._tail(_PROBE[:2], 1)
        if not self.generation_prompt:  # the template may prompt for the next reply without being asked
            shared = self._whole_tokens(_common_prefix(ending, self._tail(_PROBE, 1)), ending)
            ending = shared if self._added_token.search(shared) else ending
            opening = self._opening_token()
            ending = ending.partition(opening)[0] if opening else ending
        return ending

    def _opening_token(self) -> str | None:
        """The added token, not the beginning of the text, with which the template opens its first turn."""
        text = self.render(_PROBE[:1])
        first = min((span.start for span in text.spans), default=0)
        tokens = [t for t in self._added_token.findall(str.__str__(text)[:first]) if t != self.tokenizer.bos_token]
        return tokens[0] if tokens else None

    @cached_property
    def _ends_turns_midway(self) -> bool:
        return self._added_token.match(self._tail(_PROBE, 1).lstrip()) is not None

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that end a turn: the one that is learned, and the tokenizer's end of sequence."""
        tokens = self._added_token.findall(self.turn_ending)
        tokens = tokens[-1:] or self._added_token.findall(self._tail(_PROBE, 1))[:1]
        ids = {self.tokenizer.convert_tokens_to_ids(token) for token in tokens if token != self.tokenizer.bos_token}
        return tuple(sorted(ids | ({self.tokenizer.eos_token_id} - {None})))

    def check_against_library(self, messages: Sequence[Message]) -> None:
        """Raise TemplateError unless our rendering equals ``apply_chat_template`` for this conversation."""
        plain = [{"role": m.role, "content": m.content} for m in messages]
        theirs = self.tokenizer.apply_chat_template(plain, tokenize=False)
        if "strftime_now" not in self._template.source and self.render(messages) != theirs:
            raise TemplateError("the conversation renders differently in transformers; please report this template")

    def encode(self, texts: Sequence[Rendered]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Tokenise rendered conversations.

        Returns:
            For each, ``input_ids`` and ``labels`` (int32 ``[L]``), labels not shifted, unsupervised tokens
            ``IGNORE_INDEX``. A token belongs to the span in which it begins.
        """
        encoded = self._encoder.encode([Text(r.text, r.spans, r.data) for r in texts])
        pairs = []
        for tokens in encoded:
            labels = np.full(len(tokens.ids), IGNORE_INDEX, dtype=np.int32)
            for begin, end in tokens.spans:
                labels[begin:end] = tokens.ids[begin:end]
            pairs.append((tokens.ids, labels))
        return pairs

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids that ask the model for its next turn."""
        text = self.render(messages, add_generation_prompt=True)
        (tokens,) = self._encoder.encode([Text(str.__str__(text), data=_data(text))])
        return tokens.ids.tolist()


def _common_prefix(one: str, other: str) -> str:
    return "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _data(text: TracedStr) -> tuple[tuple[int, int], ...]:
    """Character ranges that come from messages."""
    return tuple((span.start, span.end) for span in text.spans if span.origin != MARK)


def _content(text: TracedStr, spans: Sequence[Span]) -> str:
    return "".join(str.__getitem__(text, slice(span.start, span.end)) for span in spans)

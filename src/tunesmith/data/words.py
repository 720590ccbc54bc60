"""Small things that are known of texts: tokens in them, what two have in common, which parts come from messages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tunesmith.data.trace import TOOLS, Span, TracedStr
from tunesmith.data.wire import owner
from tunesmith.types import Message


@dataclass(frozen=True, slots=True)
class Words:
    """What is known of a template and its tokenizer.

    Attributes:
        tokens: finds an added token of the tokenizer.
        bos: the token that begins a text, if any.
        eos: the token that ends a text, if any.
        prompt: what the template appends when asked to prompt for a reply.
        opening: the token that opens a turn, if the template prompts for the next reply without being asked.
        ending: what the template writes after a final assistant turn.
        ends_midway: whether it writes a token after an assistant turn that is not the last.
        openers: tokens that it writes before a user's turn; where nothing ends a turn, they do not either.
    """

    tokens: re.Pattern[str]
    bos: str | None = None
    eos: str | None = None
    prompt: str = ""
    opening: str | None = None
    ending: str = ""
    ends_midway: bool = False
    openers: frozenset[str] = frozenset()

    def whole(self, prefix: str, text: str) -> str:
        """``prefix`` of ``text``, shortened if it ends inside an added token of ``text``."""
        for token in self.tokens.finditer(text):
            if token.start() < len(prefix) < token.end():
                return prefix[: token.start()]
        return prefix

    def last_end(self, text: str) -> int:
        """Where the last added token of ``text`` ends; 0 if it has none."""
        return max((token.end() for token in self.tokens.finditer(text)), default=0)

    def ends(self, tail: str) -> bool:
        """Whether text after a turn's own text ends the turn."""
        return bool(self.last_end(tail)) or bool(tail.strip() and tail.strip().endswith(self.ending.strip() or "\0"))


def common_length(one: str, other: str) -> int:
    """Characters that two texts have in common at their beginning."""
    if one.startswith(other):
        return len(other)
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one.startswith(other[low:middle], low) else (low, middle - 1)
    return low


def blanks(text: str, start: int) -> int:
    """White space from ``start`` on."""
    return len(text) - start - len(text[start:].lstrip())


def merged(spans: Iterable[Span]) -> tuple[tuple[int, int], ...]:
    """Character ranges of spans, in order, those that touch made one."""
    ranges: list[tuple[int, int]] = []
    for span in sorted(spans):
        if ranges and span.start <= ranges[-1][1]:
            ranges[-1] = (ranges[-1][0], max(ranges[-1][1], span.end))
        else:
            ranges.append((span.start, span.end))
    return tuple(ranges)


def unshown(text: TracedStr, messages: Sequence[Message], has_tools: bool) -> list[str]:
    """Remarks on messages other than the assistant's, and on tools, that a rendering does not show."""
    shown = {owner(span.origin) for span in text.spans}
    roles = {m.role for i, m in enumerate(messages) if m.role != "assistant" and m.content.strip() and i not in shown}
    notes = [f"the template does not show a message of the role {role}" for role in sorted(roles)]
    if has_tools and TOOLS not in shown:
        notes.append("the template does not show the tools")
    return notes

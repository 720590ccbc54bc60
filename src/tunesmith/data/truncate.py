"""Rows that are longer than the cutoff: refused, left out, or shortened by a rule that is counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from tunesmith.types import Message

Truncation = Literal["error", "drop", "keep_end", "keep_start", "split"]
Fits = Callable[[tuple[Message, ...]], bool]
"""Whether a conversation, rendered and tokenised, is within the cutoff."""


def keep_end(messages: Sequence[Message], answer: int, fits: Fits) -> tuple[Message, ...] | None:
    """The end of a conversation that fits: the oldest exchanges go first, then the head of the last question.

    System turns at the start stay. Answers are never cut, so that each keeps its end.

    Args:
        messages: the conversation.
        answer: number of the message from which on everything stays, with the question before it.
        fits: monotone: what fits still fits when something is taken away.

    Returns:
        The shortened conversation, or None where even the last exchange without its question's text is too long.
    """
    head = next((i for i, m in enumerate(messages) if m.role not in ("system", "developer")), len(messages))
    starts = [i for i, m in enumerate(messages) if head < i < answer and m.role == "user"]

    def from_turn(start: int) -> tuple[Message, ...]:
        return (*messages[:head], *messages[start:])

    low, high = 0, len(starts)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(from_turn(starts[middle])) else (middle + 1, high)
    if low < len(starts):
        return from_turn(starts[low])
    return _without_head(from_turn(starts[-1] if starts else head), head, fits)


def _without_head(messages: tuple[Message, ...], question: int, fits: Fits) -> tuple[Message, ...] | None:
    """Leave out as little as will do from the head of the question's text."""
    if question >= len(messages) or messages[question].role != "user":
        return None
    content = messages[question].content

    def keeping(count: int) -> tuple[Message, ...]:
        shortened = replace(messages[question], content=content[len(content) - count :])
        return (*messages[:question], shortened, *messages[question + 1 :])

    low, high = 1, len(content)
    if not content or not fits(keeping(low)):
        return None
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(keeping(middle)) else (low, middle)
    return keeping(low)

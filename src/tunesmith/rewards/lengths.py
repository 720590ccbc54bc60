"""``length`` and ``repetition``: how long an answer is, and how much of it says the same again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

from pydantic import Field

from tunesmith.rewards.words import words_of


def length(
    prompts: Sequence[str],
    responses: Sequence[str],
    references: Sequence[str],
    *,
    target: Annotated[int, Field(gt=0)],
    tolerance: Annotated[int, Field(gt=0)] | None = None,
    unit: Literal["chars", "words", "tokens"] = "words",
    count_tokens: Callable[[str], int],
) -> list[float]:
    """1 for a response of the target's length, falling in a straight line to 0 at ``tolerance`` more or less.

    Args:
        prompts: not looked at.
        responses: what is judged.
        references: not looked at.
        target: the best length.
        tolerance: the target itself if None, so that an empty response gets 0.
        unit: characters without white space around the text, words (Chinese characters are one each), or tokens of the model.
        count_tokens: how many tokens a text has.

    Example:
        ``target=4, tolerance=2``: five words get 0.5, six words or more 0.
    """
    measures: dict[str, Callable[[str], int]] = {
        "chars": lambda text: len(text.strip()), "words": lambda text: len(words_of(text)), "tokens": count_tokens,
    }  # fmt: skip
    measure, reach = measures[unit], tolerance or target
    return [max(0.0, 1.0 - abs(measure(response) - target) / reach) for response in responses]


def repetition(
    prompts: Sequence[str],
    responses: Sequence[str],
    references: Sequence[str],
    *,
    size: Annotated[int, Field(gt=0)] = 3,
) -> list[float]:
    """Minus the share of sequences of ``size`` words that a response has said before; 0 where it has none.

    Args:
        prompts: not looked at.
        responses: what is judged.
        references: not looked at.
        size: words of a sequence (Chinese characters are one each).

    Example:
        ``"a b a b a"`` has three pairs of words that are one of two: ``size=2`` gives ``-(4 - 2) / 4 = -0.5``.
    """
    return [_repeated([word.casefold() for word in words_of(response)], size) for response in responses]


def _repeated(words: Sequence[str], size: int) -> float:
    sequences = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
    return (len(set(sequences)) - len(sequences)) / len(sequences) if sequences else 0.0

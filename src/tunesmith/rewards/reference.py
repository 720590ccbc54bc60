"""``reference``: how near an answer is to the one that the data give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from tunesmith.rewards.words import plain, words_of

_ORDERS = range(1, 7)
_BETA = 2


def reference(
    prompts: Sequence[str],
    responses: Sequence[str],
    references: Sequence[str],
    *,
    measure: Literal["exact", "f1", "chrf"] = "exact",
) -> list[float]:
    """Between 0 and 1 for each response. Width of characters, case, white space and punctuation at the ends never count.

    Args:
        prompts: not looked at.
        responses: what is judged.
        references: what the data give.
        measure: ``exact``: 1 if both are the same. ``f1``: words that both have, as F1 (Chinese characters are one word each).
            ``chrf``: sequences of 1 to 6 characters that both have, recall counted twice (chrF2; Popović, WMT 2015).
    """
    judge = {"exact": _exact, "f1": _f1, "chrf": _chrf}[measure]
    return [judge(plain(response), plain(wanted)) for response, wanted in zip(responses, references, strict=True)]


def _exact(given: str, wanted: str) -> float:
    return float(given == wanted)


def _f1(given: str, wanted: str) -> float:
    """``2 P R / (P + R)`` over words, each as often as it stands there."""
    ours, theirs = Counter(words_of(given)), Counter(words_of(wanted))
    total = ours.total() + theirs.total()
    return 2 * (ours & theirs).total() / total if total else 0.0


def _chrf(given: str, wanted: str) -> float:
    """``(1 + b^2) P R / (b^2 P + R)``; P and R are means over the lengths of sequences that both texts have."""
    given, wanted = "".join(given.split()), "".join(wanted.split())
    precisions, recalls = [], []
    for order in _ORDERS:
        ours, theirs = _sequences(given, order), _sequences(wanted, order)
        if ours and theirs:
            common = (ours & theirs).total()
            precisions.append(common / ours.total())
            recalls.append(common / theirs.total())
    if not any(precisions):
        return 0.0
    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return (1 + _BETA**2) * precision * recall / (_BETA**2 * precision + recall)


def _sequences(text: str, order: int) -> Counter[str]:
    return Counter(text[i : i + order] for i in range(len(text) - order + 1))

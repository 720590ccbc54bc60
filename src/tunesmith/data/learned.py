"""Tokens with the stretches of them that are learned: what an example is before its labels are written out."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tunesmith.types import IGNORE_INDEX, Example, Message, Source, Tools


class Learned(NamedTuple):
    """A tokenised row.

    Attributes:
        ids: int32 array ``[L]``.
        spans: (start, end, weight) of each learned stretch, disjoint and in order.
        source: the row it was made from.
        good: of feedback and of the two answers of a pair, whether it is a good or the better one.
        reference: of a prompt, the answer that the data give.
        messages, tools: of a prompt, what the tokens were made of.
        margin: of the better answer of a pair, by how much it is better, as the data say.
    """

    ids: np.ndarray
    spans: tuple[tuple[int, int, float], ...]
    source: Source
    good: bool = True
    reference: str = ""
    margin: float = 0.0
    messages: tuple[Message, ...] = ()
    tools: Tools = ()

    @property
    def supervised(self) -> int:
        """Tokens that are learned: those of the spans, the first of the row excepted (nothing predicts it)."""
        return sum(end - max(start, 1) for start, end, _ in self.spans if end > 1)

    def part(self, begin: int, end: int) -> Learned:
        """Tokens ``begin:end`` with what is learned of them."""
        end = min(end, len(self.ids))
        clipped = ((max(a, begin) - begin, min(b, end) - begin, weight) for a, b, weight in self.spans)
        return self._replace(ids=self.ids[begin:end], spans=tuple(span for span in clipped if span[0] < span[1]))

    def example(self) -> Example:
        """With labels, and with weights where they are not all 1."""
        labels = np.full(len(self.ids), IGNORE_INDEX, dtype=np.int32)
        weights = None
        if any(weight != 1 for _, _, weight in self.spans):
            weights = np.ones(len(self.ids), dtype=np.float32)
        for start, end, weight in self.spans:
            labels[start:end] = self.ids[start:end]
            if weights is not None:
                weights[start:end] = weight
        return Example(self.ids, labels, self.source, weights)

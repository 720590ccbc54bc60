"""Which rows form which update. The order is a function of (seed, epoch), so a position is two numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil

import numpy as np

from tunesmith.data.collator import collate
from tunesmith.types import Batch, Example


class DataLoader:
    """Groups examples into windows: the micro-batches of one update.

    The last window of an epoch may be short; a window never spans two epochs.

    Args:
        examples: the rows.
        batch_size: rows in a micro-batch.
        accumulation: micro-batches in a window.
        seed: of the order.
        shuffle: False keeps file order.
    """

    def __init__(
        self, examples: Sequence[Example], batch_size: int, accumulation: int = 1, seed: int = 42, shuffle: bool = True
    ) -> None:
        self.examples = examples
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.seed = seed
        self.shuffle = shuffle

    def __len__(self) -> int:
        """Windows in an epoch."""
        return ceil(len(self.examples) / (self.batch_size * self.accumulation))

    def order(self, epoch: int) -> np.ndarray:
        """Row indices in the order of an epoch."""
        if not self.shuffle:
            return np.arange(len(self.examples))
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.examples))

    def windows(self, epoch: int, start: int = 0) -> Iterator[list[Batch]]:
        """The windows of an epoch, from window ``start`` on."""
        order = self.order(epoch)
        rows = self.batch_size * self.accumulation
        for begin in range(start * rows, len(order), rows):
            window = order[begin : begin + rows]
            yield [
                collate([self.examples[i] for i in window[j : j + self.batch_size]])
                for j in range(0, len(window), self.batch_size)
            ]

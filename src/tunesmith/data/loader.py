"""Which rows form which update. The order is a function of (seed, epoch), so a position is two numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil
from typing import Any

import numpy as np

from tunesmith.data.collator import collate
from tunesmith.data.pack import pack
from tunesmith.data.selection import Blocks, Examples, Selection
from tunesmith.types import Batch, Example


def lengths_of(examples: Sequence[Example] | Examples) -> np.ndarray:
    """Tokens of each example, int64 ``[N]``, without reading them where they lie on disk."""
    if isinstance(examples, Selection | Blocks):
        return examples.lengths
    return np.array([len(example) for example in examples], dtype=np.int64)


class _Singles(Sequence[Sequence[int]]):
    """``[[0], [1], [2], ...]`` without the memory."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        return [index]


class DataLoader:
    """Groups examples into windows: the micro-batches of one update.

    The last window of an epoch may be short; a window never spans two epochs. Without packing a unit is a row; with
    packing it is a pack of rows, the same packs in every epoch, in an order of its own. Rows never see each other
    either way.

    Args:
        examples: the rows.
        batch_size: rows, or packs, in a micro-batch.
        accumulation: micro-batches in a window.
        seed: of the order.
        shuffle: False keeps file order (of packs: the order of the first row of each).
        capacity: tokens of a pack; None does not pack.
    """

    def __init__(
        self,
        examples: Sequence[Example] | Examples,
        batch_size: int,
        accumulation: int = 1,
        seed: int = 42,
        shuffle: bool = True,
        capacity: int | None = None,
    ) -> None:
        self.examples = examples
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.seed = seed
        self.shuffle = shuffle
        if capacity is None:
            self.units: Sequence[Sequence[int]] = _Singles(len(examples))
        else:
            packs = pack(lengths_of(examples).tolist(), capacity)
            self.units = sorted((sorted(rows) for rows in packs), key=lambda rows: rows[0])

    def __len__(self) -> int:
        """Windows in an epoch."""
        return ceil(len(self.units) / (self.batch_size * self.accumulation))

    def order(self, epoch: int) -> np.ndarray:
        """Unit numbers in the order of an epoch."""
        if not self.shuffle:
            return np.arange(len(self.units))
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.units))

    def windows(self, epoch: int, start: int = 0) -> Iterator[list[Batch]]:
        """The windows of an epoch, from window ``start`` on."""
        order = self.order(epoch)
        count = self.batch_size * self.accumulation
        for begin in range(start * count, len(order), count):
            window = order[begin : begin + count]
            yield [self._batch(window[j : j + self.batch_size]) for j in range(0, len(window), self.batch_size)]

    def _batch(self, units: np.ndarray) -> Batch:
        return collate([self.examples[row] for unit in units.tolist() for row in self.units[unit]])

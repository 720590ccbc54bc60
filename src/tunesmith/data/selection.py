"""Rows of one or several stores in a chosen order, and documents cut into blocks, both read when asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from tunesmith.data.lazy import Lazy
from tunesmith.data.learned import Learned
from tunesmith.data.memory import RowsInMemory
from tunesmith.data.store import TokenSet
from tunesmith.types import Example, Source


class Selection(Lazy[Example]):
    """Chosen rows of stores.

    Args:
        sets: the stores.
        index: row numbers, counted through all stores, int64 ``[N]``; None: all rows, in order.
    """

    def __init__(self, sets: Sequence[TokenSet], index: np.ndarray | None = None) -> None:
        self.sets = tuple(sets)
        self._starts = np.cumsum([0, *(len(s) for s in sets)])
        self.numbers = np.arange(self._starts[-1]) if index is None else np.asarray(index, dtype=np.int64)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 ``[N]``."""
        return self._gather([s.lengths for s in self.sets])

    @property
    def good(self) -> np.ndarray:
        """Whether each row is a good or the better answer, bool ``[N]``."""
        return self._gather([s.good for s in self.sets]).astype(bool)

    @property
    def rows(self) -> np.ndarray:
        """A number for each example's row, the same for all views of a row and for rows drawn twice, int64 ``[N]``."""
        numbers = [_numbered(s.rows) for s in self.sets]
        shifts = np.cumsum([0, *(int(n.max(initial=-1)) + 1 for n in numbers)])
        return self._gather([n + shift for n, shift in zip(numbers, shifts, strict=False)])

    def _gather(self, columns: Sequence[np.ndarray]) -> np.ndarray:
        joined: np.ndarray = np.concatenate([np.zeros(0, dtype=np.int64), *columns])[self.numbers]
        return joined

    @property
    def supervised(self) -> int:
        """Tokens that are learned."""
        return int(self._gather([s.supervised for s in self.sets]).sum())

    def pick(self, chosen: np.ndarray) -> Selection:
        """The rows at these positions, or where a mask is true."""
        return Selection(self.sets, self.numbers[chosen])

    @property
    def row_starts(self) -> np.ndarray:
        """Where the examples of each row begin, and the number of all examples, int64 ``[rows + 1]``."""
        goes_on = (np.diff(self.rows) == 0) & (np.diff(self.numbers) == 1)
        return np.append(np.flatnonzero(~np.concatenate([[False], goes_on])[: len(self)]), len(self))

    def pick_rows(self, order: np.ndarray) -> Selection:
        """The rows with these numbers, each with all its examples."""
        starts = self.row_starts
        counts = np.diff(starts)[order]
        shifts = starts[:-1][order] - (counts.cumsum() - counts)
        return self.pick(np.repeat(shifts, counts) + np.arange(counts.sum()))

    def __len__(self) -> int:
        return len(self.numbers)

    def item(self, index: int) -> Example:
        """A row with its labels."""
        number, row = self._find(index)
        return self.sets[number].item(row)

    def _find(self, index: int) -> tuple[int, int]:
        row = int(self.numbers[index])
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return number, row - int(self._starts[number])

    def learned(self, index: int) -> Learned:
        """A row as its store keeps it."""
        number, row = self._find(index)
        return self.sets[number].learned(row)

    def tokens(self, index: int) -> np.ndarray:
        """Token ids of a row, int32, not copied."""
        number, row = self._find(index)
        return self.sets[number].tokens(row)

    def source(self, index: int) -> Source:
        """Where a row comes from."""
        number, row = self._find(index)
        return self.sets[number].source(row)

    def fingerprint(self) -> str:
        """SHA-256 of the stores' contents and of what is chosen of them."""
        digest = hashlib.sha256("".join(s.digest for s in self.sets).encode())
        digest.update(self.numbers.astype("<i8").tobytes())
        return digest.hexdigest()


def joined(selections: Sequence[Selection]) -> Selection:
    """One selection after the other."""
    shifts = np.cumsum([0, *(sum(len(s) for s in selection.sets) for selection in selections)])
    index = [selection.numbers + shift for selection, shift in zip(selections, shifts, strict=False)]
    return Selection([s for selection in selections for s in selection.sets], np.concatenate([np.zeros(0, np.int64), *index]))


class Blocks(Lazy[Example]):
    """Documents laid end to end and cut into blocks; every token is learned but the first of a block.

    Args:
        documents: tokenised, each with the tokens that open and close it.
        length: tokens of a block.
    """

    def __init__(self, documents: Selection | RowsInMemory, length: int) -> None:
        self.documents = documents
        self.length = length
        self._ends = documents.lengths.cumsum()

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each block, int64 ``[N]``."""
        return np.full(len(self), self.length, dtype=np.int64)

    @property
    def supervised(self) -> int:
        """Tokens that are learned: all but the first of each block."""
        return (self.length - 1) * len(self)

    @property
    def remainder(self) -> int:
        """Tokens at the end that do not fill another block."""
        return (int(self._ends[-1]) if len(self._ends) else 0) % self.length

    def __len__(self) -> int:
        return (int(self._ends[-1]) if len(self._ends) else 0) // self.length

    def item(self, index: int) -> Example:
        """A block, every token of it learned."""
        begin = index * self.length
        end = begin + self.length
        first = int(np.searchsorted(self._ends, begin, side="right"))
        last = int(np.searchsorted(self._ends, end, side="left"))
        offset = int(self._ends[first - 1]) if first else 0
        joined = np.concatenate([self.documents.tokens(i) for i in range(first, last + 1)])
        ids = joined[begin - offset : end - offset]
        return Example(ids, ids, self.documents.source(first))

    def fingerprint(self) -> str:
        """SHA-256 of the documents and the length."""
        return hashlib.sha256(f"{self.documents.fingerprint()} {self.length}".encode()).hexdigest()


Examples = Selection | Blocks | RowsInMemory
"""What is trained or evaluated on."""


def _numbered(rows: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... for each change of row."""
    changed = np.diff(rows, prepend=rows[:1]) != 0
    return changed.cumsum()


def split(selection: Selection, held_out: int, seed: int) -> tuple[Selection, Selection]:
    """Divide into (train, eval) by rows, both in order; all views of a row, and a row drawn twice, stay on one side.

    Args:
        selection: all rows.
        held_out: rows to evaluate on.
        seed: the same seed gives the same rows.
    """
    rows, row_of = _distinct(selection.rows)
    chosen = np.zeros(len(rows), dtype=bool)
    chosen[np.random.default_rng(seed).permutation(len(rows))[:held_out]] = True
    theirs = dict.fromkeys(selection.numbers[chosen[row_of]].tolist())
    return selection.pick(~chosen[row_of]), Selection(selection.sets, np.array(list(theirs), dtype=np.int64))


def _distinct(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different values in order, and for each value which one it is."""
    different = np.unique(values)
    return different, np.searchsorted(different, values)


def draw(selection: Selection, count: int, seed: int) -> Selection:
    """``count`` rows in a seeded order, with all their views; the set is repeated when it has fewer."""
    rows = len(selection.row_starts) - 1
    generator = np.random.default_rng(seed)
    order = [generator.permutation(rows) for _ in range(-(-count // max(rows, 1)))]
    return selection.pick_rows(np.concatenate([np.zeros(0, np.int64), *order])[:count])


def interleave(lengths: Sequence[int], probabilities: Sequence[float] | None, over: bool, seed: int) -> np.ndarray:
    """Order of rows when sets are mixed, as numbers counted through all sets.

    By turns, or by drawing the set of each next row. It ends when the first set is used up, or, with ``over``, when every
    set has been used up once; a set that ends earlier begins again.

    Args:
        lengths: rows of each set.
        probabilities: of each set; None: by turns.
        over: whether to go on until the last set has ended.
        seed: of the draws.

    Example:
        ``interleave([2, 3], None, False, 0) == [0, 2, 1]`` (after row 1 the first set has ended), with ``over``
        ``[0, 2, 1, 3, 0, 4]``.
    """
    generator = np.random.default_rng(seed)
    starts = np.cumsum([0, *lengths[:-1]]).tolist()
    used = [0] * len(lengths)
    shares = None if probabilities is None else np.asarray(probabilities) / sum(probabilities)
    order: list[int] = []
    draws: list[int] = []
    while not (all if over else any)(count >= length for count, length in zip(used, lengths, strict=True)):
        if probabilities is None:
            number = len(order) % len(lengths)
        else:
            draws = draws or generator.choice(len(lengths), 1000, p=shares).tolist()[::-1]
            number = draws.pop()
        order.append(starts[number] + used[number] % lengths[number])
        used[number] += 1
    return np.array(order, dtype=np.int64)

"""Rows of one or several sets, tokenised as they are asked for, with a cursor from which they go on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby, islice
from typing import NamedTuple

import numpy as np

from tunesmith.config.arguments import DatasetAttr
from tunesmith.data.learned import Learned
from tunesmith.data.pipeline import ChunkMaker, Result
from tunesmith.data.report import LISTED, DataReport, Policy
from tunesmith.data.source import read_rows
from tunesmith.errors import DataError

CHUNK = 256
"""Raw rows that are tokenised together."""
_DRAWN = 1024


@dataclass(frozen=True)
class StreamedSet:
    """A set that is tokenised while it is read.

    Attributes:
        attr: the set, its layout settled.
        dataset_dir: where its files are.
        chunks: makes tokenised rows.
        start: raw rows at its head that are passed over.
        limit: raw rows of which the last one is used; None: all.
    """

    attr: DatasetAttr
    dataset_dir: str
    chunks: ChunkMaker
    start: int = 0
    limit: int | None = None

    def results(self, row: int) -> Iterator[Result]:
        """What each chunk gives, from this raw row on."""
        rows = read_rows(self.attr, self.dataset_dir, skip=row, limit=self.limit)
        while batch := list(islice(rows, CHUNK)):
            yield self.chunks.make(batch)


class Cursor(NamedTuple):
    """Where the reading of a set stands.

    Attributes:
        row: raw rows before the chunk that is being given out.
        taken: rows of that chunk that have been given out.
        ended: the set has been used up once.
    """

    row: int
    taken: int = 0
    ended: bool = False


class MixtureState(NamedTuple):
    """Where the reading of several sets stands.

    Attributes:
        turn: the set in use (one after the other), or how often a set has been chosen (mixed).
        cursors: of each set.
    """

    turn: int
    cursors: tuple[Cursor, ...]


class _Reader:
    """Rows of one set, each with all examples made of it."""

    def __init__(self, source: StreamedSet, cursor: Cursor, counted: int, policy: Policy) -> None:
        self.counted = counted
        self.report = DataReport()
        self._results = source.results(cursor.row)
        self._policy = policy
        self._row = self._after = cursor.row
        self._rows: list[list[Learned]] = []
        self._next = 0
        if cursor.taken and self._advance():
            self._next = cursor.taken

    def more(self) -> bool:
        """Whether there is another row."""
        while self._next == len(self._rows):
            if not self._advance():
                return False
        return True

    def take(self) -> list[Learned]:
        """The examples of the next row."""
        self._next += 1
        return self._rows[self._next - 1]

    def cursor(self, ended: bool) -> Cursor:
        """Where the next row is found again."""
        return Cursor(self._row, self._next, ended)

    def _advance(self) -> bool:
        result = next(self._results, None)
        if result is None:
            return False
        self._row, self._after = self._after, self._after + result.rows
        self._rows = [list(made) for _, made in groupby(result.learned, key=lambda learned: learned.source)]
        self._next = 0
        if self._row >= self.counted:
            self.counted = self._after
            replace(result.report, read=self._after).raise_fatal(self._policy)
            self.report.merge(result.report, LISTED)
        return True


class Turns:
    """Which set gives the next row when sets are mixed.

    Args:
        sets: how many.
        shares: of each; empty: by turns.
        seed: of the draws.
    """

    def __init__(self, sets: int, shares: tuple[float, ...], seed: int) -> None:
        self.shares = shares
        self._sets = sets
        self._shares = np.asarray(shares) / sum(shares) if shares else None
        self._seed = seed
        self._number = -1
        self._drawn: list[int] = []

    def __getitem__(self, turn: int) -> int:
        if self._shares is None:
            return turn % self._sets
        number, index = divmod(turn, _DRAWN)
        if number != self._number:
            generator = np.random.default_rng([self._seed, number])
            self._number, self._drawn = number, generator.choice(self._sets, _DRAWN, p=self._shares).tolist()
        return self._drawn[index]


class Mixture:
    """Rows of sets: one set after the other, or mixed. Each raw row is counted once, however often it is read.

    Args:
        sets: the sets.
        over: None: one after the other; False: mixed until the first, True: until the last has been used up.
        turns: which set comes next when they are mixed.
        policy: which rows end the reading.
        state: where to begin.
        counted: raw rows of each set that have been counted before.
    """

    def __init__(
        self,
        sets: tuple[StreamedSet, ...],
        over: bool | None,
        turns: Turns,
        policy: Policy,
        state: MixtureState,
        counted: tuple[int, ...],
    ) -> None:
        self._sets = sets
        self._over = over
        self._turns = turns
        self._policy = policy
        self._turn = state.turn
        self._cursors = list(state.cursors)
        self._counted = list(counted)
        self._readers: dict[int, _Reader] = {}
        self._report = DataReport()

    @property
    def state(self) -> MixtureState:
        """From which the next row is found again."""
        return MixtureState(self._turn, tuple(self._cursors))

    @property
    def counted(self) -> tuple[int, ...]:
        """Raw rows of each set that are in the account."""
        return tuple(self._counted)

    def collect(self) -> DataReport:
        """The account of the rows read since the last time."""
        collected, self._report = self._report, DataReport()
        return collected

    def more(self) -> bool:
        """Whether there is another row.

        Raises:
            DataError: rows that end the run, a file that cannot be read, or a set to be mixed in has no row.
        """
        if self._over is None:
            while self._turn < len(self._sets) and not self._has_more(self._turn):
                self._readers.pop(self._turn)
                self._turn += 1
            return self._turn < len(self._sets)
        return not (all if self._over else any)(cursor.ended for cursor in self._cursors)

    def take(self) -> list[Learned]:
        """The examples of the next row, of which there must be one. Raises DataError as ``more`` does."""
        number = self._turn
        if self._over is not None:
            number = self._turns[self._turn]
            self._turn += 1
            if not self._has_more(number):
                self._begin_again(number)
        reader = self._readers[number]
        rows = reader.take()
        ended = self._cursors[number].ended
        if self._over is not None and not self._has_more(number):
            ended = True
        self._cursors[number] = reader.cursor(ended)
        return rows

    def _has_more(self, number: int) -> bool:
        if number not in self._readers:
            self._readers[number] = _Reader(self._sets[number], self._cursors[number], self._counted[number], self._policy)
        reader = self._readers[number]
        found = reader.more()
        if reader.counted > self._counted[number]:
            self._counted[number] = reader.counted
            self._report.merge(reader.report, LISTED)
            reader.report = DataReport()
        return found

    def _begin_again(self, number: int) -> None:
        ended = self._cursors[number].ended
        self._cursors[number] = Cursor(self._sets[number].start, 0, ended)
        self._readers.pop(number)
        if not ended or not self._has_more(number):
            name = self._sets[number].attr.dataset_name
            raise DataError(f"data set {name!r}: has no row to train on; leave it out of the mix")

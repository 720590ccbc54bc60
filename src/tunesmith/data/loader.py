"""Which rows form which update.

The order is a function of (seed, epoch), so a position is two numbers; in a stream, those and where the reading stood.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence, Sized
from math import ceil
from typing import Any, Protocol

import numpy as np

from tunesmith.config.arguments import TrainingArguments
from tunesmith.data.collator import collate
from tunesmith.data.kinds import Rows
from tunesmith.data.memory import RowsInMemory
from tunesmith.data.pack import pack
from tunesmith.data.prefetch import made_ahead
from tunesmith.data.report import LISTED, DataReport, pack_report, unpack_report
from tunesmith.data.selection import Blocks, Examples, Selection
from tunesmith.data.streaming import ExampleStream, Position, Unit
from tunesmith.types import Batch, Example

Window = tuple[list[Batch], bool]
"""The micro-batches of one update, and whether an epoch ends with it."""


class Loader(Protocol):
    """What gives the windows of a run."""

    @property
    def report(self) -> DataReport | None:
        """What has become of the rows so far; None where they were counted before."""

    @property
    def rows(self) -> int:
        """Rows to train on, as far as is known."""

    def onward(self, epoch: int, window: int, place: Mapping[str, Any]) -> Generator[Window]:
        """Windows without end, from the position where ``epoch`` and ``window`` are done and ``place`` was returned."""

    def place(self) -> dict[str, Any]:
        """What is to be known of a position beside epoch and window."""

    def passes(self, epoch: int, window: int) -> float:
        """How often the rows have been passed over."""


_MEGABATCH = 50


def lengths_of(examples: Sequence[Example] | Examples | Rows[Any]) -> np.ndarray:
    """Tokens of each example, int64 ``[N]``, without reading them where they lie on disk."""
    if isinstance(examples, Selection | Blocks | RowsInMemory | Rows):
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
        by_length: rows of similar length share a window (see ``group_by_length``).
    """

    report: DataReport | None = None
    """Rows are counted when they are prepared, not here."""

    def __init__(
        self,
        examples: Sequence[Example] | Examples | Rows[Any],
        batch_size: int,
        accumulation: int = 1,
        seed: int = 42,
        shuffle: bool = True,
        capacity: int | None = None,
        by_length: bool = False,
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
        self._lengths = lengths_of(examples) if by_length else None

    def __len__(self) -> int:
        """Windows in an epoch."""
        return ceil(len(self.units) / (self.batch_size * self.accumulation))

    def order(self, epoch: int) -> np.ndarray:
        """Unit numbers in the order of an epoch."""
        if not self.shuffle:
            return np.arange(len(self.units))
        drawn = np.random.default_rng([self.seed, epoch]).permutation(len(self.units))
        return drawn if self._lengths is None else group_by_length(drawn, self._lengths, self.batch_size * self.accumulation)

    def windows(self, epoch: int, start: int = 0) -> Iterator[list[Batch]]:
        """The windows of an epoch, from window ``start`` on."""
        order = self.order(epoch)
        count = self.batch_size * self.accumulation
        for begin in range(start * count, len(order), count):
            window = order[begin : begin + count]
            yield [self._batch(window[j : j + self.batch_size]) for j in range(0, len(window), self.batch_size)]

    def onward(self, epoch: int, window: int, place: Mapping[str, Any]) -> Generator[Window]:
        """Windows from a position on, without end.

        Args:
            epoch: passes done.
            window: windows of this one done.
            place: what ``place`` returned there; nothing more is needed here.
        """
        while True:
            for number, batches in enumerate(self.windows(epoch, window), window + 1):
                yield batches, number == len(self)
            epoch, window = epoch + 1, 0

    def place(self) -> dict[str, Any]:
        """What is to be known of a position beside epoch and window: nothing."""
        return {}

    def passes(self, epoch: int, window: int) -> float:
        """How often the rows have been passed over."""
        return epoch + window / len(self)

    @property
    def rows(self) -> int:
        """Rows to train on."""
        return len(self.examples)

    def _batch(self, units: np.ndarray) -> Batch:
        return collate([self.examples[row] for unit in units.tolist() for row in self.units[unit]])


def group_by_length(order: np.ndarray, lengths: np.ndarray, count: int) -> np.ndarray:
    """Rearrange a drawn order so that rows of similar length stand together, as transformers' ``LengthGroupedSampler`` does.

    Stretches of 50 windows (fewer where there are few rows) are sorted by falling length. The longest window of all is put
    first, so that memory that does not suffice is noticed at once.

    Args:
        order: row numbers in a drawn order, int64 ``[N]``.
        lengths: tokens of each row, int64 ``[N]``.
        count: rows of a window.

    Returns:
        The same numbers, int64 ``[N]``.
    """
    size = count * max(min(len(order) // (4 * count), _MEGABATCH), 1)
    stretches = [order[begin : begin + size] for begin in range(0, len(order), size)]
    made = np.concatenate([stretch[np.argsort(-lengths[stretch], kind="stable")] for stretch in stretches])
    longest = int(np.argmax(lengths[made])) // size * size
    if longest:
        moved = min(count, len(made) - longest)
        made[:moved], made[longest : longest + moved] = made[longest : longest + moved].copy(), made[:moved].copy()
    return made


class StreamLoader:
    """Groups what a stream gives into windows; a thread fills the next buffer while one is in use.

    A window may reach from one buffer into the next, and never spans two epochs.

    Args:
        stream: the rows.
        batch_size: rows, packs or blocks in a micro-batch.
        accumulation: micro-batches in a window.
    """

    def __init__(self, stream: ExampleStream, batch_size: int, accumulation: int = 1) -> None:
        self.stream = stream
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.report = _sum(stream.report)
        """What has become of the rows so far, those of the buffer in use included."""
        self._at, self._unit, self._before = stream.beginning(), 0, DataReport()

    def onward(self, epoch: int, window: int, place: Mapping[str, Any]) -> Generator[Window]:
        """Windows from a position on, without end.

        Args:
            epoch: passes done.
            window: windows of this one done.
            place: what ``place`` returned there; empty at the beginning.

        Raises:
            DataError: a file cannot be read, or rows that end the run.
        """
        if place:
            self._at, self._unit = Position.from_dict(place["at"]), place["unit"]
            self._before = unpack_report(place["report"])
        assert self._at.epoch == epoch, (self._at, epoch)
        count = self.batch_size * self.accumulation
        start, first, before = self._at, self._unit, self._before
        waiting: list[Unit] = []
        with made_ahead(lambda stopped: self.stream.buffers(start, stopped)) as buffers:
            for buffer in buffers:
                after = _sum(before, buffer.report)
                self.report = _sum(self.stream.report, after)
                for number in range(first if buffer.start == start else 0, len(buffer.units)):
                    if len(waiting) == count:
                        self._at, self._unit, self._before = buffer.start, number, before
                        yield self._batches(waiting), False
                        waiting = []
                    waiting.append(buffer.units[number])
                before = after
                if buffer.last:
                    self._at, self._unit, self._before = buffer.end, 0, after
                    yield self._batches(waiting), True
                    waiting = []

    def place(self) -> dict[str, Any]:
        """Where the next window begins: its buffer, its unit, and the account up to that buffer."""
        return {"at": self._at.to_dict(), "unit": self._unit, "report": pack_report(self._before)}

    def passes(self, epoch: int, window: int) -> float:
        """How often the rows have been passed over; how far the last pass is cannot be known."""
        return float(epoch)

    @property
    def rows(self) -> int:
        """Rows to train on that have been read so far."""
        return self.report.kept - self.stream.report.kept

    def _batches(self, units: Sequence[Unit]) -> list[Batch]:
        parts = [units[begin : begin + self.batch_size] for begin in range(0, len(units), self.batch_size)]
        return [collate([row.example() for unit in part for row in unit]) for part in parts]


def _sum(*reports: DataReport) -> DataReport:
    total = DataReport()
    for report in reports:
        total.merge(report, LISTED)
    return total


def make_loader(
    rows: Examples | Rows[Any] | ExampleStream, args: TrainingArguments, seed: int, shuffle: bool, capacity: int | None
) -> DataLoader | StreamLoader:
    """The loader of a run.

    Args:
        rows: to train on; a stream has an order of its own.
        args: batch size, accumulation, group_by_length.
        seed: of the order.
        shuffle: False keeps file order.
        capacity: tokens of a pack; None does not pack.
    """
    batch = (args.per_device_train_batch_size, args.gradient_accumulation_steps)
    if isinstance(rows, ExampleStream):
        return StreamLoader(rows, *batch)
    return DataLoader(rows, *batch, seed, shuffle, capacity, args.group_by_length)


def planned_updates(loader: Loader, args: TrainingArguments) -> int:
    """Updates of the whole run."""
    if args.max_steps >= 0:
        return args.max_steps
    assert isinstance(loader, Sized), "rules ask for max_steps where rows are streamed"
    return ceil(args.num_train_epochs * len(loader))


def visited(loader: DataLoader, updates: int) -> np.ndarray:
    """Numbers of the units that so many updates come to, int64."""
    if updates >= len(loader):
        return np.arange(len(loader.units))
    return np.sort(loader.order(0)[: updates * loader.batch_size * loader.accumulation])

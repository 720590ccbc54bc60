"""Sets that are never stored: rows are tokenised while training asks for them, shuffled within a buffer, and found again.

The rows of an epoch are divided into buffers. Each is filled in the order of the files and given out in an order drawn from
(seed, epoch, number of the buffer), so that a position is where the reading stood when the buffer was begun, and how much
of it has been used: to go on, one buffer is filled anew.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tunesmith.config.arguments import RunConfig
from tunesmith.data.collector import collector_paused
from tunesmith.data.learned import Learned
from tunesmith.data.memory import RowsInMemory
from tunesmith.data.mixture import Cursor, Mixture, MixtureState, StreamedSet, Turns
from tunesmith.data.pack import pack
from tunesmith.data.pipeline import ChunkMaker
from tunesmith.data.prefetch import Stopped
from tunesmith.data.prepare import blocks, check_columns, data_seed, find_set, load_set, make_recipe, target_of
from tunesmith.data.report import LISTED, DataReport, Policy, reasons
from tunesmith.data.selection import Blocks, Examples, joined
from tunesmith.data.sniff import Target
from tunesmith.data.source import data_files, file_sha, read_rows
from tunesmith.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IN_ORDER = 1024
"""Rows of a buffer where they keep their order."""
MOST_TOKENS = 1 << 24
"""Tokens after which a buffer is full, however few its rows are: 64 MiB."""
_HASHED_WHOLE = 1 << 30
_SAMPLES = 64
_SAMPLE = 1 << 20

Unit = Sequence[Learned]
"""What a batch counts: a row, a pack of rows, or a block of documents."""


@dataclass(frozen=True)
class Position:
    """The beginning of a buffer.

    Attributes:
        epoch: passes before it.
        buffer: buffers of the epoch before it.
        state: where the reading stands.
        counted: raw rows of each set that are in the account.
        skipped: tokens of its first document that lie in an earlier block.
    """

    epoch: int
    buffer: int
    state: MixtureState
    counted: tuple[int, ...]
    skipped: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values from which ``from_dict`` makes it again."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Position:
        """The position that ``to_dict`` packed."""
        turn, cursors = values["state"]
        state = MixtureState(turn, tuple(Cursor(*cursor) for cursor in cursors))
        return cls(values["epoch"], values["buffer"], state, tuple(values["counted"]), values["skipped"])


class Buffer(NamedTuple):
    """A stretch of a stream.

    Attributes:
        units: in the order of training.
        start, end: where it, and the next one, begins.
        report: the account of the rows that were first read for it.
    """

    units: Sequence[Unit]
    start: Position
    end: Position
    report: DataReport

    @property
    def last(self) -> bool:
        """Whether the epoch ends with it."""
        return self.end.epoch > self.start.epoch


@dataclass(frozen=True)
class Order:
    """How the rows of a stream become units, and in which order.

    Attributes:
        size: rows of a buffer.
        shuffle: draw the order within a buffer; False: that of the files.
        seed: of the order.
        capacity: tokens of a pack; None does not pack.
        block: tokens of a block of documents; None: rows are dialogues.
    """

    size: int
    shuffle: bool
    seed: int
    capacity: int | None = None
    block: int | None = None


@dataclass(frozen=True)
class ExampleStream:
    """Rows to train on, made as they are asked for, again and again.

    Attributes:
        sets: where they come from.
        over: None: one set after the other; else mixed until the first (False) or last (True) is used up.
        turns: which set comes next when they are mixed.
        order: how rows become units.
        policy: which rows end the run.
        report: what is known of the data before the first row is read.
    """

    sets: tuple[StreamedSet, ...]
    over: bool | None
    turns: Turns
    order: Order
    policy: Policy = "auto"
    report: DataReport = field(default_factory=DataReport)

    def beginning(self, epoch: int = 0, counted: tuple[int, ...] | None = None) -> Position:
        """Where an epoch begins."""
        starts = tuple(one.start for one in self.sets)
        return Position(epoch, 0, MixtureState(0, tuple(map(Cursor, starts))), starts if counted is None else counted)

    def first(self, count: int) -> tuple[list[Learned], DataReport]:
        """The first rows, or blocks of documents, in the order of the files, and the account of what was read for them.

        Raises:
            DataError: as ``buffers``.
        """
        plain = replace(self, order=replace(self.order, size=count, shuffle=False, capacity=None))
        made: list[Learned] = []
        report = DataReport()
        for buffer in plain.buffers(plain.beginning()):
            made += [row for unit in buffer.units for row in unit]
            report.merge(buffer.report)
            if len(made) >= count or buffer.last:
                break
        return made[:count], report

    def fingerprint(self) -> str:
        """SHA-256 of all that decides which rows are trained on, and in which order.

        Of a file, its name and the SHA-256 of its bytes; of one above 1 GiB its size and 64 pieces of 1 MiB at equal
        distances, the first and the last among them, so that a start does not read a terabyte. What is changed elsewhere in
        such a file, without a change of its size, is not noticed.
        """
        facts = {
            "sets": [_set_facts(one) for one in self.sets],
            "over": self.over,
            "shares": self.turns.shares,
            "order": asdict(self.order),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def buffers(self, start: Position, stopped: Stopped = lambda: False) -> Iterator[Buffer]:
        """Buffers from a position on, without end.

        Args:
            start: where to begin.
            stopped: asked between rows; once true, nothing more is made.

        Raises:
            DataError: a file cannot be read, rows that end the run, or a whole epoch has nothing to learn.
        """
        epoch = self._rows if self.order.block is None else self._blocks
        while not stopped():
            seen = DataReport()
            for buffer in epoch(start, stopped):
                seen.merge(buffer.report, LISTED)
                if buffer.last and not buffer.start.buffer and not buffer.units:
                    raise DataError(_nothing(self.order, seen))
                yield buffer._replace(units=[buffer.units[index] for index in self._drawn(buffer)])
                start = buffer.end

    def _drawn(self, buffer: Buffer) -> Sequence[int]:
        """Unit numbers in the order of training."""
        count = len(buffer.units)
        if not self.order.shuffle:
            return range(count)
        generator = np.random.default_rng([self.order.seed, buffer.start.epoch, buffer.start.buffer])
        order: list[int] = generator.permutation(count).tolist()
        return order

    def _mixture(self, start: Position, policy: Policy) -> Mixture:
        return Mixture(self.sets, self.over, self.turns, policy, start.state, start.counted)

    def _after(self, start: Position, mixture: Mixture) -> Position:
        """Where the next buffer begins."""
        if not mixture.more():
            return self.beginning(start.epoch + 1, mixture.counted)
        return Position(start.epoch, start.buffer + 1, mixture.state, mixture.counted)

    def _rows(self, start: Position, stopped: Stopped) -> Iterator[Buffer]:
        """The rest of an epoch of dialogues; units in the order of the files."""
        mixture, epoch = self._mixture(start, self.policy), start.epoch
        while start.epoch == epoch:
            rows: list[Learned] = []
            tokens = 0
            with collector_paused():
                while len(rows) < self.order.size and tokens < MOST_TOKENS and mixture.more():
                    if stopped():
                        return
                    made = mixture.take()
                    rows += made
                    tokens += sum(len(row.ids) for row in made)
                end = self._after(start, mixture)
            yield Buffer(self._units(rows), start, end, mixture.collect())
            start = end

    def _units(self, rows: list[Learned]) -> Sequence[Unit]:
        if self.order.capacity is None:
            return [[row] for row in rows]
        packs = pack([len(row.ids) for row in rows], self.order.capacity)
        return [[rows[number] for number in numbers] for numbers in sorted(sorted(numbers) for numbers in packs)]

    def _blocks(self, start: Position, stopped: Stopped) -> Iterator[Buffer]:
        """The rest of an epoch of documents: laid end to end, cut into blocks; what fills none goes on to the next buffer."""
        length = self.order.block
        assert length is not None
        mixture, epoch = self._mixture(start, self.policy), start.epoch
        documents: list[Learned] = []
        states: list[MixtureState] = []
        while start.epoch == epoch:
            tokens = sum(len(document.ids) for document in documents) - start.skipped
            with collector_paused():
                while (len(documents) < self.order.size and tokens < MOST_TOKENS) or tokens < length:
                    if stopped():
                        return
                    if not mixture.more():
                        break
                    states.append(mixture.state)
                    documents += mixture.take()
                    tokens += len(documents[-1].ids)
                end = self._after(start, mixture)
            units, used = _cut(documents, start.skipped, length)
            report = mixture.collect()
            if not start.epoch:
                report.tokens += length * len(units)
                report.supervised += (length - 1) * len(units)
                report.remainder += tokens % length if end.epoch > epoch else 0
            if end.epoch == epoch and used.document < len(documents):
                end = replace(end, state=states[used.document], skipped=used.tokens)
            documents, states = documents[used.document :], states[used.document :]
            yield Buffer(units, start, end, report)
            start = end


class _Used(NamedTuple):
    document: int
    tokens: int


def _cut(documents: Sequence[Learned], skipped: int, length: int) -> tuple[list[Unit], _Used]:
    """Blocks of documents, and the document and its token at which the rest begins."""
    laid = np.concatenate([np.zeros(0, np.int32), *(document.ids for document in documents)])[skipped:]
    ends = np.cumsum([len(document.ids) for document in documents]) - skipped
    begins = np.arange(0, len(laid) - length + 1, length)
    spans = ((0, length, 1.0),)
    units: list[Unit] = []
    for begin, first in zip(begins.tolist(), np.searchsorted(ends, begins, side="right").tolist(), strict=True):
        units.append([Learned(laid[begin : begin + length], spans, documents[first].source)])
    rest = length * len(units)
    document = int(np.searchsorted(ends, rest, side="right"))
    return units, _Used(document, rest - int(ends[document - 1]) if document else skipped + rest)


def _nothing(order: Order, report: DataReport) -> str:
    if order.block is not None and report.kept:
        tokens = f"{report.kept} documents with {report.remainder:,} tokens"
        return f"{tokens} do not fill one block; lower cutoff_len ({order.block})"
    return "no trainable tokens in any row:\n  " + reasons(report.of("unreadable", "uncertified", "dropped"))


# ---- from a configuration


def load_stream(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, report: DataReport
) -> tuple[ExampleStream, Examples | None]:
    """(train, eval) rows of a configuration with ``streaming``; the training rows are yet to be read.

    Evaluation rows are those of ``eval_dataset``, stored as usual, or the first ``val_size`` raw rows, which are kept in
    memory and not trained on. What became of them goes to ``report``.

    Raises:
        DataError: a set cannot be used, or rows to evaluate on that ``on_bad_row`` does not let pass.
        TemplateError: the tokenizer cannot be used for the stage.
    """
    data, seed, target = config.data, data_seed(config), target_of(config)
    own = copy.deepcopy(tokenizer)  # used by another thread than the one that trains
    sets = [open_set(config, name, number, target, own, report) for number, name in enumerate(data.dataset)]
    turns = Turns(len(sets), data.interleave_probs, seed)
    over = None if data.mix_strategy == "concat" or len(sets) == 1 else data.mix_strategy == "interleave_over"
    held_out: Examples | None = None
    if data.eval_dataset:
        held_out = joined([load_set(config, name, 0, tokenizer, report, target) for name in data.eval_dataset])
    elif data.val_size:
        heads = Counter(0 if over is None else turns[turn] for turn in range(int(data.val_size)))
        rows = [row for number, count in sorted(heads.items()) for row in _head(sets[number], count, report)]
        sets = [replace(one, start=heads[number]) for number, one in enumerate(sets)]
        held_out = RowsInMemory(rows)
    report.raise_fatal(data.on_bad_row)
    if held_out is not None and not len(held_out):
        raise DataError("no row to evaluate on is left:\n  " + reasons(report.of("unreadable", "uncertified", "dropped")))
    documents = target == "document"
    if documents and held_out is not None:
        assert not isinstance(held_out, Blocks)
        held_out = blocks(held_out, data.cutoff_len, report)
    order = Order(
        size=data.buffer_size if data.packing or not data.disable_shuffling else IN_ORDER,
        shuffle=not data.disable_shuffling,
        seed=seed,
        capacity=data.cutoff_len if data.packing and not documents else None,
        block=data.cutoff_len if documents else None,
    )
    return ExampleStream(tuple(sets), over, turns, order, data.on_bad_row, copy.deepcopy(report)), held_out


def open_set(
    config: RunConfig, name: str, number: int, target: Target, tokenizer: PreTrainedTokenizerBase, report: DataReport
) -> StreamedSet:
    """A data set, looked up and its layout found from the first rows.

    Args:
        config: of the run.
        name: of the set.
        number: its place in ``dataset``, which chooses its ``source_prefix``.
        target: what is needed of a row.
        tokenizer: of the model.
        report: told what the layout is, and which declared columns the first rows lack.

    Raises:
        DataError: the set cannot be used.
        TemplateError: the tokenizer cannot be used for the stage.
    """
    data = config.data
    attr, sentence = find_set(data, name, number, target)
    if attr.num_samples is not None:
        raise DataError(
            f"data set {name!r}: num_samples draws from all rows, which a stream does not know; remove it, and set "
            "max_samples to use only the first rows"
        )
    report.found += [sentence] if sentence else []
    opened = StreamedSet(attr, data.dataset_dir, ChunkMaker(attr, make_recipe(data, target), tokenizer), limit=data.max_samples)
    head = next(opened.results(0))
    try:
        check_columns(attr, head.columns, [row.source.file for row in head.learned[:1]])
    except DataError as error:  # it may come later; that a stored set lacks it is known for certain
        report.found.append(f"of the first {head.rows} rows: {error}")
    return opened


def _head(source: StreamedSet, count: int, report: DataReport) -> list[Learned]:
    """The first raw rows of a set, tokenised."""
    limit = count + 1 if source.limit is None else min(count + 1, source.limit)
    rows = list(read_rows(source.attr, source.dataset_dir, limit=limit))
    if len(rows) <= count:
        instead = "lower val_size" if source.limit is None else "lower val_size, or raise max_samples"
        raise DataError(
            f"data set {source.attr.dataset_name!r}: val_size holds out its first {count} rows, but it has only {len(rows)}, "
            f"and some must be left to train on; {instead}"
        )
    made = source.chunks.make(rows[:count])
    report.merge(made.report)
    return made.learned


# ---- what a stream is known by


def _set_facts(one: StreamedSet) -> dict[str, Any]:
    files = [(path.name, _file_facts(path)) for path in data_files(one.attr, one.dataset_dir)]
    return {**one.chunks.facts(), "files": files, "rows": (one.start, one.limit)}


def _file_facts(path: Path) -> str:
    size = path.stat().st_size
    if size <= _HASHED_WHOLE:
        return file_sha(path)
    digest = hashlib.sha256(f"{size}".encode())
    with path.open("rb") as file:
        for number in range(_SAMPLES):
            file.seek((size - _SAMPLE) * number // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()

"""Tokenised rows on disk: written once, in order, and read through memory maps.

A store is a folder of column files that only grow, and a journal that says after every chunk how far each file is good.
An interrupted preparation goes on after the last line of the journal. A folder without ``.partial`` in its name is
whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from filelock import FileLock

from tunesmith.data.lazy import Lazy
from tunesmith.data.learned import Learned
from tunesmith.data.report import DataReport, pack_report, unpack_report
from tunesmith.data.wire import packed, unpacked
from tunesmith.errors import DataError
from tunesmith.types import Example, Source

JOURNAL = "journal.jsonl"
_COLUMNS = {
    "ids": "<i4", "ends": "<i8", "spans": "<i4", "weights": "<f4", "span_ends": "<i8", "places": "<i8", "good": "|u1",
    "margins": "<f4", "references": "|u1", "reference_ends": "<i8", "prompts": "|u1", "prompt_ends": "<i8",
}  # fmt: skip
"""Column -> type. ``ends``, ``span_ends``, ``reference_ends`` and ``prompt_ends`` hold, for each row, how many tokens, spans
and bytes of texts (UTF-8) there are up to its end; ``spans`` pairs of token positions within the row; ``places`` (file, row,
line); ``prompts`` the turns of prompts, as JSON."""


@dataclass
class Progress:
    """What the journal says.

    Attributes:
        rows: raw rows that are done.
        examples, tokens, spans, references, prompts: written so far; of texts, the bytes.
        files: the files that rows come from, in the order of their first row.
        columns: declared columns that were seen in some row.
        digest: SHA-256 over all chunks.
        report: what became of the rows.
    """

    rows: int = 0
    examples: int = 0
    tokens: int = 0
    spans: int = 0
    references: int = 0
    prompts: int = 0
    files: list[str] = field(default_factory=list)
    columns: set[str] = field(default_factory=set)
    digest: str = ""
    report: DataReport = field(default_factory=DataReport)

    def sizes(self) -> dict[str, int]:
        """Entries of each column."""
        return {"ids": self.tokens, "ends": self.examples, "spans": 2 * self.spans, "weights": self.spans,
                "span_ends": self.examples, "places": 3 * self.examples, "good": self.examples,
                "margins": self.examples, "references": self.references, "reference_ends": self.examples,
                "prompts": self.prompts, "prompt_ends": self.examples}  # fmt: skip


@contextlib.contextmanager
def alone(target: Path) -> Iterator[None]:
    """Keep other processes from making the same store meanwhile. Raises DataError when its folder cannot be written."""
    lock = FileLock(target.with_name(f".{target.name}.lock"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise _unwritable(target.parent, error) from None
    try:
        yield
    finally:
        lock.release()


def partial(target: Path) -> Path:
    """Where a store lies while it is unfinished."""
    return target.with_name(target.name + ".partial")


class StoreWriter:
    """Writes a store, from the start or from where an interrupted one stopped.

    Args:
        target: folder of the whole store; what is unfinished lies beside it in ``<name>.partial``.

    Raises:
        DataError: the folder cannot be written.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.folder = partial(target)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.progress = read_journal(self.folder)
            self._files = {name: self._open(name) for name in _COLUMNS}
            self._journal = (self.folder / JOURNAL).open("a", encoding="utf-8")
        except OSError as error:
            raise _unwritable(self.folder, error) from None

    def _open(self, name: str) -> IO[bytes]:
        """A column file, cut back to where the journal says that it is good."""
        path = self.folder / name
        path.touch()
        good = self.progress.sizes()[name] * np.dtype(_COLUMNS[name]).itemsize
        if path.stat().st_size < good:
            raise DataError(f"{path}: shorter than its journal says; delete {self.folder} and start again")
        os.truncate(path, good)
        return path.open("ab")

    def append(self, learned: Sequence[Learned], rows: int, columns: set[str], report: DataReport) -> None:
        """Write what one chunk of raw rows gave.

        Args:
            learned: in order.
            rows: raw rows that the chunk held.
            columns: declared columns seen in it.
            report: what became of the rows.

        Raises:
            DataError: the disk is full or not writable.
        """
        progress = self.progress
        known = {file: number for number, file in enumerate(progress.files)}
        new_files: list[str] = []
        for row in learned:
            if row.source.file not in known:
                known[row.source.file] = len(known)
                new_files.append(row.source.file)
        parts = _columns_of(learned, known, progress)
        digest = hashlib.sha256(progress.digest.encode())
        try:
            for name, values in parts.items():
                data = values.astype(_COLUMNS[name]).tobytes()
                digest.update(data)
                self._files[name].write(data)
                self._files[name].flush()
            progress.rows += rows
            progress.examples += len(learned)
            progress.tokens += len(parts["ids"])
            progress.spans += len(parts["weights"])
            progress.references += len(parts["references"])
            progress.prompts += len(parts["prompts"])
            progress.files += new_files
            progress.columns |= columns
            progress.digest = digest.hexdigest()
            progress.report.merge(report)
            line = {
                "rows": progress.rows, "examples": progress.examples, "tokens": progress.tokens, "spans": progress.spans,
                "references": progress.references, "prompts": progress.prompts, "files": new_files,
                "columns": sorted(columns), "digest": progress.digest, "report": pack_report(report),
            }  # fmt: skip
            self._journal.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._journal.flush()
        except OSError as error:
            raise _unwritable(self.folder, error) from None

    def finish(self) -> None:
        """Put the whole store in its place. Raises DataError when the disk does not take it."""
        try:
            for file in self._all_files():
                file.flush()
                os.fsync(file.fileno())
            self.close()
            shutil.rmtree(self.target, ignore_errors=True)
            self.folder.rename(self.target)
        except OSError as error:
            raise _unwritable(self.folder, error) from None

    def close(self) -> None:
        """Close the files, also those that a full disk keeps from being flushed; what the journal covers is good."""
        for file in self._all_files():
            with contextlib.suppress(OSError):
                file.close()

    def _all_files(self) -> list[IO[Any]]:
        return [*self._files.values(), self._journal]


def _columns_of(learned: Sequence[Learned], files: dict[str, int], before: Progress) -> dict[str, np.ndarray]:
    spans = [span for row in learned for span in row.spans]
    references = [row.reference.encode() for row in learned]
    prompts = [packed(row.messages, row.tools).encode() for row in learned]
    places = [place for row in learned for place in (files[row.source.file], row.source.row, row.source.line)]
    return {
        "ids": np.concatenate([np.zeros(0, np.int32), *(row.ids for row in learned)]),
        "ends": before.tokens + np.array([len(row.ids) for row in learned], dtype=np.int64).cumsum(),
        "spans": np.array([bound for start, end, _ in spans for bound in (start, end)], dtype=np.int64),
        "weights": np.array([weight for _, _, weight in spans], dtype=np.float64),
        "span_ends": before.spans + np.array([len(row.spans) for row in learned], dtype=np.int64).cumsum(),
        "places": np.array(places, dtype=np.int64),
        "good": np.array([row.good for row in learned], dtype=np.uint8),
        "margins": np.array([row.margin for row in learned], dtype=np.float64),
        "references": np.frombuffer(b"".join(references), dtype=np.uint8),
        "reference_ends": before.references + np.array([len(text) for text in references], dtype=np.int64).cumsum(),
        "prompts": np.frombuffer(b"".join(prompts), dtype=np.uint8),
        "prompt_ends": before.prompts + np.array([len(text) for text in prompts], dtype=np.int64).cumsum(),
    }


def _unwritable(folder: Path, error: OSError) -> DataError:
    return DataError(
        f"{folder}: tokenised data cannot be written: {error.strerror}; make room, or set tokenized_path to another folder"
    )


def read_journal(folder: Path) -> Progress:
    """How far a store is; a last line cut short by a crash does not count."""
    progress = Progress()
    path = folder / JOURNAL
    good = 0
    for raw in path.read_bytes().split(b"\n")[:-1] if path.is_file() else ():
        try:
            line: dict[str, Any] = json.loads(raw)
        except ValueError:
            break
        good += len(raw) + 1
        progress.rows, progress.examples = line["rows"], line["examples"]
        progress.tokens, progress.spans = line["tokens"], line["spans"]
        progress.references, progress.prompts = line["references"], line["prompts"]
        progress.files += line["files"]
        progress.columns |= set(line["columns"])
        progress.digest = line["digest"]
        progress.report.merge(unpack_report(line["report"]))
    if path.is_file() and path.stat().st_size > good and folder.name.endswith(".partial"):
        os.truncate(path, good)
    return progress


class TokenSet(Lazy[Example]):
    """A whole store, read through memory maps: opening it costs nothing, whatever its size.

    Args:
        folder: of the store.
        dataset: name of the set that its rows come from.

    Raises:
        DataError: a file is missing or has another size than the journal says.
    """

    def __init__(self, folder: Path, dataset: str) -> None:
        self.dataset = dataset
        self.progress = read_journal(folder)
        sizes = self.progress.sizes()
        self._columns = {name: _map(folder / name, _COLUMNS[name], count) for name, count in sizes.items()}
        self._ends = self._columns["ends"]
        self._span_ends = self._columns["span_ends"]

    @property
    def digest(self) -> str:
        """SHA-256 of everything in the store."""
        return self.progress.digest

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 ``[N]``."""
        return np.diff(self._ends, prepend=0)

    @property
    def supervised(self) -> np.ndarray:
        """Learned tokens of each row, int64 ``[N]``."""
        bounds = self._columns["spans"].reshape(-1, 2).astype(np.int64)
        learned = np.concatenate([[0], (bounds[:, 1] - np.maximum(bounds[:, 0], 1)).clip(min=0).cumsum()])
        return np.diff(learned[self._span_ends], prepend=0)

    @property
    def good(self) -> np.ndarray:
        """Whether each row is a good or the better answer, bool ``[N]``."""
        return self._columns["good"].astype(bool)

    @property
    def rows(self) -> np.ndarray:
        """A number for each example's row, the same for all views of a row, int64 ``[N]``."""
        places = self._columns["places"].reshape(-1, 3)
        return (places[:, 0] << 40) + places[:, 1]

    def __len__(self) -> int:
        return len(self._ends)

    def item(self, index: int) -> Example:
        """A row with its labels."""
        return self.learned(index).example()

    def learned(self, index: int) -> Learned:
        """A row as it was written."""
        begin = int(self._span_ends[index - 1]) if index else 0
        end = int(self._span_ends[index])
        bounds = self._columns["spans"][2 * begin : 2 * end].reshape(-1, 2).tolist()
        weights = self._columns["weights"][begin:end].tolist()
        spans = tuple((start, stop, weight) for (start, stop), weight in zip(bounds, weights, strict=True))
        good = bool(self._columns["good"][index])
        margin = float(self._columns["margins"][index])
        reference = self._text("references", "reference_ends", index)
        messages, tools = unpacked(self._text("prompts", "prompt_ends", index))
        return Learned(np.array(self.tokens(index)), spans, self.source(index), good, reference, margin, messages, tools)

    def _text(self, column: str, ends: str, index: int) -> str:
        begin = int(self._columns[ends][index - 1]) if index else 0
        return self._columns[column][begin : int(self._columns[ends][index])].tobytes().decode()

    def tokens(self, index: int) -> np.ndarray:
        """Token ids of a row, int32, not copied."""
        begin = int(self._ends[index - 1]) if index else 0
        return self._columns["ids"][begin : int(self._ends[index])]

    def source(self, index: int) -> Source:
        """Where a row comes from."""
        file, row, line = self._columns["places"][3 * index : 3 * index + 3].tolist()
        return Source(self.dataset, self.progress.files[file], row, line)


def _map(path: Path, kind: str, count: int) -> np.ndarray:
    expected = count * np.dtype(kind).itemsize
    try:
        found = path.stat().st_size
    except OSError:
        found = -1
    if found != expected:
        raise DataError(f"{path}: has {found} bytes, its journal says {expected}; delete {path.parent} and start again")
    return np.asarray(np.memmap(path, dtype=kind, mode="r")) if count else np.zeros(0, dtype=kind)

"""Rows of Parquet and Arrow files, batch by batch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.data.json_rows import Item
from tunesmith.data.problem import RowProblem
from tunesmith.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH = 1000
_MAGIC = b"ARROW1"


def read_parquet(path: Path, skip: int = 0) -> Iterator[Item | None]:
    """Rows of a Parquet file; None for each of the first ``skip``, whole row groups of which are not read.

    Raises:
        DataError: damaged file, or two columns of one name.
    """
    import pyarrow.parquet as pq

    with _readable(path, "Parquet"), pq.ParquetFile(path) as file:
        _check_names(path, file.schema_arrow.names)
        sizes = [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]
        first = 0
        while first < len(sizes) and sizes[first] <= skip:
            yield from repeat(None, sizes[first])
            skip -= sizes[first]
            first += 1
        if first < len(sizes):
            batches = file.iter_batches(batch_size=_BATCH, row_groups=list(range(first, len(sizes))))
            yield from batch_rows(batches, skip)


def read_arrow(path: Path, skip: int = 0) -> Iterator[Item | None]:
    """Rows of an Arrow IPC file or stream; None for each of the first ``skip``.

    Raises:
        DataError: damaged file, or two columns of one name.
    """
    import pyarrow as pa
    from pyarrow import ipc

    if path.stat().st_size == 0:
        return
    with _readable(path, "Arrow"), pa.memory_map(str(path)) as mapped:
        if mapped.read(len(_MAGIC)) == _MAGIC:
            file = ipc.open_file(mapped)
            batches = (file.get_batch(index) for index in range(file.num_record_batches))
            names = file.schema.names
        else:
            mapped.seek(0)
            batches = iter(reader := ipc.open_stream(mapped))
            names = reader.schema.names
        _check_names(path, names)
        yield from batch_rows(map(_validated, batches), skip)


def batch_rows(batches: Iterator[pa.RecordBatch | pa.Table], skip: int = 0) -> Iterator[Item | None]:
    """Rows of Arrow batches as plain Python values; JSON values that ``datasets`` keeps as text are parsed."""
    for batch in batches:
        passed = min(skip, batch.num_rows)
        yield from repeat(None, passed)
        skip -= passed
        for start in range(passed, batch.num_rows, _BATCH):
            for content in _to_python(batch.slice(start, _BATCH)):
                yield 0, content


def _to_python(batch: pa.RecordBatch | pa.Table) -> list[dict[str, Any] | RowProblem]:
    parsers = {field.name: parser for field in batch.schema if (parser := _parser(field.type))}
    try:
        rows = batch.to_pylist()
        for row in rows:
            for name, parser in parsers.items():
                row[name] = parser(row[name])
    except (ValueError, OverflowError) as error:  # text that is no UTF-8, a date outside the calendar
        if batch.num_rows > 1:
            return [row for index in range(batch.num_rows) for row in _to_python(batch.slice(index, 1))]
        return [RowProblem("unreadable-value", f"a value cannot be read: {error}", "write the file again", unreadable=True)]
    return rows


def _parser(kind: pa.DataType) -> Callable[[Any], Any] | None:
    """What parses the JSON inside values of a type; None where there is none."""
    import pyarrow as pa

    if isinstance(kind, pa.JsonType):
        return lambda value: None if value is None else json.loads(value)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inner = _parser(kind.value_type)
        return inner and (lambda value: value and [inner(item) for item in value])
    if pa.types.is_struct(kind):
        parsers = {field.name: parser for field in kind if (parser := _parser(field.type))}
        if parsers:
            return lambda value: value and {k: parsers[k](v) if k in parsers else v for k, v in value.items()}
    return None


def _validated(batch: pa.RecordBatch) -> pa.RecordBatch:
    batch.validate(full=True)  # offsets from a damaged or hostile file may point outside its buffers
    return batch


def _check_names(path: Path, names: list[str]) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{path}: two columns are named {twice[0]!r}; rename one of them")


@contextmanager
def _readable(path: Path, kind: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{path}: cannot be read as {kind}: {reason}. The file may be damaged or cut off; write it again"
        ) from None

"""Readers of local files by kind, and which files a folder holds."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tunesmith.data import stream
from tunesmith.data.json_rows import Item, read_json, read_json_lines
from tunesmith.data.problem import RowProblem
from tunesmith.data.stream import PACKED, read_blocks, split_lines
from tunesmith.data.table_rows import read_arrow, read_parquet
from tunesmith.errors import DataError

_KIND = {
    ".json": "JSON",
    ".jsonl": "JSON",
    ".ndjson": "JSON",
    ".csv": "CSV",
    ".tsv": "TSV",
    ".txt": "text",
    ".parquet": "Parquet",
    ".arrow": "Arrow",
}
_TABLES: dict[str, Callable[[Path, int], Iterator[Item | None]]] = {"Parquet": read_parquet, "Arrow": read_arrow}
READ = f"{', '.join(_KIND)}; the text ones also packed ({', '.join(PACKED)})"
"""What is read, for messages."""


def ending(path: Path) -> str:
    """The ending that says what a file holds, in lower case and without ``.gz`` or ``.zst``; empty if it says nothing."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = bool(suffixes) and suffixes[-1] in PACKED
    last = (suffixes[:-1] if packed else suffixes)[-1:]
    if not last or last[0] not in _KIND or (packed and _KIND[last[0]] in _TABLES):
        return ""
    return last[0]


def read_file(path: Path, skip: int = 0) -> Iterator[Item | None]:
    """Rows of a file of any kind that is read, in order; None for each of the first ``skip``.

    Raises:
        DataError: the file as a whole cannot be read.
    """
    suffix = ending(path)
    if not suffix:
        raise DataError(f"{path}: files ending in {path.suffix or '(nothing)'} are not read; read are {READ}")
    kind = _KIND[suffix]
    if kind in _TABLES:
        return _TABLES[kind](path, skip)
    blocks = read_blocks(path)
    if kind == "JSON":
        return (read_json if suffix == ".json" else read_json_lines)(path, blocks, skip)
    if kind == "text":
        return read_text(blocks, skip)
    return read_csv(path, blocks, skip, "\t" if kind == "TSV" else ",")


def read_text(blocks: Iterator[bytes], skip: int = 0) -> Iterator[Item | None]:
    """Non-empty lines as rows ``{"text": line}``."""
    row = 0
    for number, line in enumerate(split_lines(blocks), 1):
        if line is not None and (not line or line.isspace()):
            continue
        row += 1
        if row <= skip:
            yield None
        elif line is None:
            yield number, stream.too_long()
        else:
            try:
                yield number, {"text": stream.decode(line.removesuffix(b"\r"))}
            except RowProblem as problem:
                yield number, problem


def read_csv(path: Path, blocks: Iterator[bytes], skip: int = 0, delimiter: str = ",") -> Iterator[Item | None]:
    """Rows of a table with a header; every value is text. A row with quoted line breaks has the line it begins on.

    Raises:
        DataError: no header, two columns of one name, a quoted field that is never closed, a line over 64 MiB.
    """
    csv.field_size_limit(stream.MAX_ROW)  # of the process; the default refuses fields over 128 KiB
    bad: list[RowProblem] = []
    reader = csv.reader(_csv_lines(path, blocks, bad), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    row = 0
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if str(error).startswith(("unexpected end of data", "field larger")):
                raise DataError(
                    f'{path}:{line}  a quoted field of the row that begins here is never closed; add the closing ", '
                    'and write a quote inside a field as ""'
                ) from None
            fields = []
            fix = 'write a quote inside a field as "", and put fields with line breaks in quotes'
            bad.append(RowProblem("bad-csv", f"not valid CSV: {error}", fix, unreadable=True))
        if not fields and not bad:
            continue
        if header is None:
            header = _header(path, line, fields, bad)
            continue
        row += 1
        problem = bad[0] if bad else None
        bad.clear()
        if row <= skip:
            yield None
        elif problem is not None:
            yield line, problem
        elif len(fields) != len(header):
            fix = "give every row as many fields as the header; put a field that holds the delimiter in quotes"
            found = f"{len(fields)} fields, the header has {len(header)}"
            yield line, RowProblem("wrong-field-count", found, fix, unreadable=True)
        else:
            yield line, dict(zip(header, fields, strict=True))


def _csv_lines(path: Path, blocks: Iterator[bytes], bad: list[RowProblem]) -> Iterator[str]:
    for number, line in enumerate(split_lines(blocks), 1):
        if line is None:
            raise DataError(f"{path}:{number}  {stream.too_long().message}; {stream.too_long().fix}")
        try:
            yield stream.decode(line) + "\n"
        except RowProblem as problem:
            bad.append(problem)
            yield line.decode("utf-8", "replace") + "\n"


def _header(path: Path, line: int, fields: list[str], bad: list[RowProblem]) -> list[str]:
    if bad:
        raise DataError(f"{path}:{line}  the header cannot be read: {bad[0].message}; {bad[0].fix}")
    if twice := [name for index, name in enumerate(fields) if name in fields[:index]]:
        raise DataError(f"{path}:{line}  two columns are named {twice[0]!r}; the first line must name each column once")
    return fields


# ---- folders


def folder_files(folder: Path, split: str = "train") -> list[Path]:
    """The data files of a folder, sorted by name; of a folder that ``datasets`` saved, in its order.

    Hidden files, ``dataset_info.json``, ``README*`` and ``LICENSE*`` are no data.

    Args:
        folder: holds files of one kind, or what ``save_to_disk`` wrote.
        split: which part of a saved ``DatasetDict``.

    Raises:
        DataError: no data file, files of several kinds or of one that is not read, or folders inside.
    """
    if (folder / "dataset_dict.json").is_file():
        parts = _listed(folder / "dataset_dict.json", "splits")
        if split not in parts:
            raise DataError(f"{folder}: no split {split!r}; it holds {', '.join(map(str, parts))}")
        folder = folder / split
    elif (folder / "state.json").is_file():
        _check_saved_split(folder, split)
    if (folder / "state.json").is_file():
        return [_saved_file(folder, entry) for entry in _listed(folder / "state.json", "_data_files")]
    found = sorted(path for path in folder.iterdir() if _is_data(path))
    if inner := [path.name for path in found if path.is_dir()]:
        raise DataError(f"{folder}: holds folders ({_list(inner)}); name the one to read, or set split in dataset_info.json")
    if strange := [path.name for path in found if not ending(path) or not path.is_file()]:
        raise DataError(f"{folder}: holds files that are not read ({_list(strange)}); read are {READ}. Move them elsewhere")
    if not found:
        raise DataError(f"{folder}: holds no data file; read are {READ}")
    kinds = {_KIND[ending(path)]: path.name for path in reversed(found)}
    if len(kinds) > 1:
        listed = ", ".join(f"{kind} ({name})" for kind, name in sorted(kinds.items()))
        raise DataError(f"{folder}: holds files of several kinds: {listed}; keep one kind in the folder, or name one file")
    return found


def _is_data(path: Path) -> bool:
    return not path.name.startswith((".", "README", "LICENSE")) and path.name != "dataset_info.json"


def _check_saved_split(folder: Path, split: str) -> None:
    saved = _state(folder / "state.json").get("_split")
    if split != "train" and saved is not None and saved != split:
        raise DataError(f"{folder}: is the split {saved!r} of a set, not {split!r}; name the folder of that split")


def _listed(path: Path, key: str) -> list[Any]:
    found = _state(path).get(key)
    if not isinstance(found, list):
        raise DataError(f"{path}: not what save_to_disk writes: no list {key!r}; save the set again")
    return found


def _state(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise TypeError("no object")
        return value
    except (ValueError, TypeError, OSError) as error:
        raise DataError(f"{path}: not what save_to_disk writes ({type(error).__name__}: {error}); save the set again") from None


def _saved_file(folder: Path, entry: Any) -> Path:
    name = entry.get("filename") if isinstance(entry, dict) else None
    if not isinstance(name, str) or Path(name).name != name or ending(Path(name)) != ".arrow":
        raise DataError(
            f"{folder / 'state.json'}: names a file {name!r}; expected an .arrow file of this folder; save the set again"
        )
    if not (folder / name).is_file():
        raise DataError(f"{folder / name}: missing, though state.json names it; save the set again")
    return folder / name


def _list(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")

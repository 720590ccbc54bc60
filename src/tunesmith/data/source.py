"""Reads the user's files row by row, with the exact place of whatever is wrong."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunesmith.config.arguments import DatasetAttr
from tunesmith.data.registry import resolve_file
from tunesmith.errors import DataError
from tunesmith.types import Source

Row = tuple[dict[str, Any], Source]


def read_rows(attr: DatasetAttr, dataset_dir: str, max_samples: int | None = None, seed: int = 42) -> list[Row]:
    """All rows of one data set as (columns, source).

    Raises:
        DataError: missing file, wrong hash, wrong encoding, invalid JSON (file:line:column), a row that is no object.
    """
    path = resolve_file(attr, dataset_dir)
    _check_sha1(attr, path)
    rows = list(_iter_file(path, attr.dataset_name))
    if not rows:
        raise DataError(f"{path}: holds no rows")
    if attr.num_samples is not None:
        rows = _draw(rows, attr.num_samples, seed)
    return rows[:max_samples] if max_samples is not None else rows


def _draw(rows: list[Row], count: int, seed: int) -> list[Row]:
    """``count`` rows in a seeded order; the set is repeated when it has fewer."""
    generator = random.Random(seed)
    drawn: list[Row] = []
    while len(drawn) < count:
        drawn.extend(generator.sample(rows, min(len(rows), count - len(drawn))))
    return drawn


def file_sha(path: Path, algorithm: str = "sha256") -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def _check_sha1(attr: DatasetAttr, path: Path) -> None:
    if attr.dataset_sha1 is None:
        return
    found = file_sha(path, "sha1")
    if found != attr.dataset_sha1.lower():
        raise DataError(
            f"{path}: its SHA-1 is {found}, but dataset_info.json says {attr.dataset_sha1}; "
            "fetch the file again, or correct the hash if the change is meant"
        )


def read_text(path: Path) -> str:
    """A text file as str, without a byte-order mark. Raises DataError with a hint when it is not UTF-8."""
    data = path.read_bytes()
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path}: looks like UTF-16; save it as UTF-8 (iconv -f UTF-16 -t UTF-8)")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        try:
            data.decode("gb18030")
            hint = "it reads as GBK; save it as UTF-8 (iconv -f GB18030 -t UTF-8)"
        except UnicodeDecodeError:
            hint = "save the file as UTF-8"
        raise DataError(f"{path}:{line}  not UTF-8 (byte {error.start}): {hint}") from None


def _iter_file(path: Path, dataset: str) -> Iterator[Row]:
    if path.suffix not in (".json", ".jsonl", ".txt"):
        raise DataError(
            f"{path}: files ending in {path.suffix or '(nothing)'} are not read in this version; use .json, .jsonl or .txt"
        )
    text = read_text(path)
    if path.suffix == ".txt":
        filled = ((at, content) for at, content in enumerate(text.split("\n"), 1) if content.strip())
        for row, (at, content) in enumerate(filled, 1):
            yield {"text": content.removesuffix("\r")}, Source(dataset, str(path), row, at)
        return
    rows = _iter_array(text, path) if path.suffix == ".json" and text.lstrip()[:1] == "[" else _iter_lines(text, path)
    for number, (value, line) in enumerate(rows, 1):
        if not isinstance(value, dict):
            raise DataError(f"{path}:{line}  row {number}: expected an object of columns, found {type(value).__name__}")
        yield value, Source(dataset, str(path), number, line)


def _iter_lines(text: str, path: Path) -> Iterator[tuple[Any, int]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line), number
            except json.JSONDecodeError as error:
                raise _bad_json(path, number, error.pos + 1, error.msg, line) from None
            except RecursionError:
                raise DataError(f"{path}:{number}  nested too deeply") from None


def _iter_array(text: str, path: Path) -> Iterator[tuple[Any, int]]:
    decoder = json.JSONDecoder()
    position = text.index("[") + 1
    line, counted = 1, 0
    while True:
        position = _skip_space(text, position)
        line += text.count("\n", counted, position)
        counted = position
        if text[position : position + 1] == "]":
            if text[:position].rstrip().endswith(","):
                raise _bad_json(path, line, 1, "a comma after the last row", text[max(position - 40, 0) : position + 1])
            if rest := text[position + 1 :].strip():
                number = text.count("\n", 0, _skip_space(text, position + 1)) + 1
                raise _bad_json(path, number, 1, "text after the end of the array", rest)
            return
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            near = text[max(error.pos - 40, 0) : error.pos + 20]
            raise _bad_json(path, error.lineno, error.colno, error.msg, near) from None
        except RecursionError:
            raise DataError(f"{path}:{line}  nested too deeply") from None
        yield value, line
        position = _skip_space(text, position)
        if text[position : position + 1] == ",":
            position += 1
        elif text[position : position + 1] != "]":
            number = text.count("\n", 0, position) + 1
            column = position - text.rfind("\n", 0, position)
            raise _bad_json(path, number, column, "expected ',' or ']' after a row", text[position : position + 40])


def _skip_space(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\t", "\n", "\r"):
        position += 1
    return position


def _bad_json(path: Path, line: int, column: int, reason: str, near: str) -> DataError:
    shown = near.strip()
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return DataError(f"{path}:{line}:{column}  not valid JSON: {reason}. Near: {shown!r}")

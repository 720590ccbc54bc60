"""Rows of JSON files: one a line, or one array read bit by bit; what is wrong is named with its exact place."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from tunesmith.data import stream
from tunesmith.data.json_parse import MAX_DEPTH, explain, near, parse_row
from tunesmith.data.problem import RowProblem
from tunesmith.data.stream import split_lines
from tunesmith.errors import DataError

Item = tuple[int, dict[str, Any] | RowProblem]
"""The line on which a row begins (0: the file has no lines), and its columns or what is wrong with it."""

_NOT_SPACE = re.compile(rb"[^ \t\r\n]")
_BODY = rb'[^"\\\x00-\x1f]*+(?:\\[^\x00-\x1f][^"\\\x00-\x1f]*+)*+'
_STRING_BODY = re.compile(_BODY)
_TOKEN = re.compile(rb'"' + _BODY + rb'"|[\[\]{}"]')
_SCALAR = re.compile(rb"[^\s,\[\]{}\"]*+")


# ---- one row a line


def read_json_lines(path: Path, blocks: Iterator[bytes], skip: int = 0) -> Iterator[Item | None]:
    """Rows of a file with one JSON object a line; blank lines are passed over. None for each of the first ``skip`` rows.

    Raises:
        DataError: the first row is an object spread over several lines.
    """
    row = 0
    for number, line in enumerate(split_lines(blocks), 1):
        if line is not None and (not line or line.isspace()):
            continue
        row += 1
        if row == 1 and line is not None and line.strip() == b"{":
            raise DataError(
                f"{path}:{number}  begins with one object spread over several lines; expected one row a line, or a .json "
                "file that is an array of rows: [{...}, {...}]"
            )
        if row <= skip:
            yield None
        elif line is None:
            yield number, stream.too_long()
        else:
            yield number, _parse_line(line)


def _parse_line(line: bytes) -> dict[str, Any] | RowProblem:
    try:
        return parse_row(line)
    except json.JSONDecodeError as error:
        return RowProblem(
            "bad-json",
            f"not valid JSON: {explain(error)}. Near: {near(error)}",
            "correct the line",
            error.pos + 1,
            unreadable=True,
        )
    except RowProblem as problem:
        return problem


# ---- one array


def read_json(path: Path, blocks: Iterator[bytes], skip: int = 0) -> Iterator[Item | None]:
    """Rows of a ``.json`` file: an array if its first character says so, else one object a line."""
    head = b""
    for block in blocks:
        head += block
        if first := _NOT_SPACE.search(head):
            rest = chain((head,), blocks)
            reader = read_json_array if first[0] == b"[" else read_json_lines
            yield from reader(path, rest, skip)
            return


def read_json_array(path: Path, blocks: Iterator[bytes], skip: int = 0) -> Iterator[Item | None]:
    """Rows of a file that is one JSON array. Memory holds a block and a row, whatever the size of the file.

    Raises:
        DataError: broken JSON, with line and column; a row longer than 64 MiB.
    """
    window = _Window(path, blocks)
    at = window.seek(window.seek(0) + 1)
    row = 0
    while window.data[at : at + 1] != b"]":
        at, end = _find_end(window, at)
        window.count_to(at)
        line = window.line
        row += 1
        yield None if row <= skip else (line, _parse_element(window, at, end))
        at = window.seek(end)
        if window.data[at : at + 1] == b",":
            at = window.seek(at + 1)
            if window.data[at : at + 1] == b"]":
                raise window.broken(at, "a comma after the last row")
        elif window.data[at : at + 1] != b"]":
            raise window.broken(at, "expected ',' or ']' after a row")
    at = window.seek(at + 1)
    if at < len(window.data):
        raise window.broken(at, "text after the end of the array")


class _Window:
    """The part of a file that is being looked at, and where in the file it lies."""

    def __init__(self, path: Path, blocks: Iterator[bytes]) -> None:
        self.data = b""
        self.line = 1
        self._path = path
        self._blocks = blocks
        self._counted = 0
        self._line_start = 0
        self._before = 0  # characters of the current line that were dropped

    def grow(self, keep: int) -> bool:
        """Drop what lies before ``keep``, so that it becomes 0, and read on; False at the end of the file."""
        self.count_to(keep)
        if self._line_start < keep:
            self._before += _characters(self.data[self._line_start : keep])
            self._line_start = keep
        rest, size = [self.data[keep:]], 0
        wanted = len(rest[0])  # twice as much each time, so that a long row is joined few times
        for block in self._blocks:
            rest.append(block)
            size += len(block)
            if size > wanted:
                break
        self.data = b"".join(rest)
        self._line_start -= keep
        self._counted -= keep
        return size > 0

    def seek(self, at: int) -> int:
        """Position of the next character that is no space; the end of the data at the end of the file."""
        while not (found := _NOT_SPACE.search(self.data, at)):
            if not self.grow(len(self.data)):
                return len(self.data)
            at = 0
        return found.start()

    def count_to(self, at: int) -> None:
        """Move the line count on."""
        if count := self.data.count(b"\n", self._counted, at):
            self.line += count
            self._line_start = self.data.rfind(b"\n", self._counted, at) + 1
            self._before = 0
        self._counted = at

    def place(self, at: int) -> tuple[int, int]:
        """Line and column (in characters), both from 1."""
        self.count_to(at)
        return self.line, self._before + _characters(self.data[self._line_start : at]) + 1

    def broken(self, at: int, reason: str) -> DataError:
        """The error of a file that is no valid JSON at a place."""
        if at >= len(self.data):
            reason = f"the file ends before the array does ({reason})"
        text = repr(self.data[max(at - 24, 0) : at + 24].decode("utf-8", "replace"))
        line, column = self.place(at)
        return DataError(f"{self._path}:{line}:{column}  not valid JSON: {reason}. Near: {text}. Correct the file there")


def _characters(data: bytes) -> int:
    return len(data.decode("utf-8", "replace"))


def _find_end(window: _Window, start: int) -> tuple[int, int]:
    """(start, end) of the value that begins at ``start``; the window may move, and the start with it."""
    at, depth = start, 0
    compound = window.data[start : start + 1] in (b"{", b"[", b'"')
    while True:
        if compound:
            at, depth, done = _scan(window, start, at, depth)
        else:
            at = _SCALAR.match(window.data, start).end()  # type: ignore[union-attr]
            done = at < len(window.data)
        if done:
            if at == start:
                raise window.broken(at, "expected a row")
            return start, at
        if len(window.data) - start > stream.MAX_ROW:
            reason = f"a row longer than {stream.MAX_ROW >> 20} MiB, or one that is never closed"
            raise _locate(window, start, reason, at_start=True)
        at -= start
        if not window.grow(start):
            if compound:
                raise _locate(window, 0, "unclosed row")
            if not window.data:
                raise window.broken(0, "expected a row or ']'")
            return 0, len(window.data)
        start = 0


def _scan(window: _Window, start: int, at: int, depth: int) -> tuple[int, int, bool]:
    """Go on over strings and brackets: (where it stopped, depth there, whether the value ended)."""
    data = window.data
    for token in _TOKEN.finditer(data, at):
        first = data[token.start()]
        if first == 0x22:  # a quote
            if token.end() - token.start() == 1:
                stop = _STRING_BODY.match(data, token.end()).end()  # type: ignore[union-attr]
                if stop < len(data) - 1 or (stop < len(data) and data[stop] != 0x5C):
                    raise _locate(window, start, "a string with a control character")
                return token.start(), depth, False
        elif first in b"[{":
            depth += 1
        else:
            depth -= 1
        if depth <= 0:
            return token.end(), depth, True
    return len(data), depth, False


def _locate(window: _Window, start: int, otherwise: str, at_start: bool = False) -> DataError:
    """The error of the broken value that begins at ``start``.

    Args:
        window: holds the value, perhaps not all of it.
        start: where it begins.
        otherwise: what is wrong if what the window holds is sound so far.
        at_start: that is to be said of the value's start, not of the end of the window.
    """
    text = window.data[start:].decode("utf-8", "surrogateescape")
    try:
        json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError as error:
        unclosed = error.msg.startswith("Unterminated string")
        ended = error.pos >= len(text.rstrip()) and not error.msg.startswith("Invalid control character")
        if at_start and (unclosed or ended):
            return window.broken(start, otherwise)
        return window.broken(_position(start, error), otherwise if ended else explain(error))
    except RecursionError:
        return window.broken(start, f"nested more than {MAX_DEPTH} levels deep")
    return window.broken(start, otherwise)


def _position(start: int, error: json.JSONDecodeError) -> int:
    return start + len(error.doc[: error.pos].encode("utf-8", "surrogateescape"))


def _parse_element(window: _Window, start: int, end: int) -> dict[str, Any] | RowProblem:
    data = window.data[start:end]
    try:
        return parse_row(data)
    except json.JSONDecodeError as error:
        raise window.broken(_position(start, error), explain(error)) from None
    except RowProblem as problem:
        if problem.column is None:
            return problem
        before = data[: problem.column - 1]
        if problem.code != "not-utf8":
            before = data.decode("utf-8")[: problem.column - 1].encode()
        if problem.code == "nul-character":  # broken JSON: where the next row begins is not to be trusted
            raise window.broken(start + len(before), problem.message) from None
        line, column = window.place(start + len(before))
        found = f"{problem.message}, in line {line}, column {column}"
        return RowProblem(problem.code, found, problem.fix, unreadable=True)

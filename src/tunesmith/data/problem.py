"""What can be wrong with one row. A problem has a code, is counted and named, and never silent."""

from __future__ import annotations

from typing import NamedTuple

from tunesmith.types import Source


class RowProblem(Exception):
    """A row that cannot be trained on.

    Args:
        code: short name of the kind of problem, e.g. ``empty-answer``; the same for all rows that share it.
        message: what was found and what was expected, without the row's place and without its text.
        fix: what to do about it.
        column: 1-based column in the line, where the problem has one.
        unreadable: the row is no data at all (broken JSON, wrong encoding); by default such a row ends the run.
    """

    def __init__(self, code: str, message: str, fix: str = "", column: int | None = None, unreadable: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.fix = fix
        self.column = column
        self.unreadable = unreadable


class BadRow(NamedTuple):
    """A row with the problem that was found in it."""

    source: Source
    problem: RowProblem

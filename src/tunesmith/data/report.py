"""What became of every row: kept, left out, cut, remarked on, each with its place and its reason."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tunesmith.data.problem import RowProblem
from tunesmith.errors import DataError
from tunesmith.types import Source

Kind = Literal["unreadable", "uncertified", "dropped", "cut", "note"]
"""``unreadable``: no data at all. ``uncertified``: no proven mask. ``dropped``: otherwise left out. ``cut``: kept in part.
``note``: kept, and something a person should know."""
Policy = Literal["auto", "drop", "error"]
"""Which rows end a run. auto: those that cannot be read or certified. drop: none. error: every one that is left out."""

_FATAL: dict[Policy, tuple[Kind, ...]] = {
    "auto": ("unreadable", "uncertified"), "drop": (), "error": ("unreadable", "uncertified", "dropped"),
}  # fmt: skip
_LEFT_OUT: tuple[Kind, ...] = ("unreadable", "uncertified", "dropped")
_SHOWN = 5
LISTED = 1000
"""Rows that are named in an account where not all are."""


@dataclass
class Finding:
    """Rows that share a problem or a remark.

    Attributes:
        kind: what became of them.
        code: short name of the problem.
        message: what was found.
        fix: what to do about it.
        count: how many rows they are.
        rows: where, with the column in the line or None; of rows that are kept, the first thousand.
    """

    kind: Kind
    code: str
    message: str
    fix: str
    count: int = 0
    rows: list[tuple[Source, int | None]] = field(default_factory=list)

    def add(self, count: int, rows: Sequence[tuple[Source, int | None]]) -> None:
        """Count further rows."""
        self.count += count
        room = len(rows) if self.kind in _LEFT_OUT else LISTED - len(self.rows)
        self.rows.extend(rows[: max(room, 0)])

    def places(self, most: int = _SHOWN) -> str:
        """The first rows, named."""
        return ", ".join(place(*row) for row in self.rows[:most]) + (", ..." if self.count > most else "")


@dataclass
class DataReport:
    """The account of one preparation.

    Attributes:
        read: rows in the files (after max_samples).
        kept: rows from which examples were made.
        tokens: tokens of the examples.
        supervised: how many of them are learned.
        remainder: tokens behind the last full block of each set, left out (stage pt).
        found: what the rows of sets without a declared layout look like.
        findings: (kind, message) -> rows that share it.
    """

    read: int = 0
    kept: int = 0
    tokens: int = 0
    supervised: int = 0
    remainder: int = 0
    found: list[str] = field(default_factory=list)
    findings: dict[tuple[Kind, str], Finding] = field(default_factory=dict)

    def add(self, kind: Kind, code: str, message: str, source: Source, fix: str = "", column: int | None = None) -> None:
        """Count a row."""
        self.findings.setdefault((kind, message), Finding(kind, code, message, fix)).add(1, [(source, column)])

    def merge(self, other: DataReport, most: int | None = None) -> None:
        """Add another account to this one.

        Args:
            other: the other one.
            most: rows named in all; what further rows have is counted, without their places, and messages that have not
                been met by then are not told apart. None: no bound.
        """
        self.read += other.read
        self.kept += other.kept
        self.tokens += other.tokens
        self.supervised += other.supervised
        self.remainder += other.remainder
        self.found += other.found
        room = None if most is None else max(most - sum(len(f.rows) for f in self.findings.values()), 0)
        for (kind, message), theirs in other.findings.items():
            rows = theirs.rows[:room]
            if room is not None:
                room -= len(rows)
                if not rows and (kind, message) not in self.findings:
                    message = f"{theirs.code} (too many kinds to tell apart)"
            own = self.findings.setdefault((kind, message), Finding(theirs.kind, theirs.code, message, theirs.fix))
            own.add(theirs.count, rows)

    def problem(self, problem: RowProblem, source: Source) -> None:
        """Count a row that is left out because of a problem in it."""
        kind: Kind = "unreadable" if problem.unreadable else "dropped"
        fix = problem.fix[:1].upper() + problem.fix[1:]
        self.add(kind, problem.code, problem.message, source, fix, problem.column)

    def of(self, *kinds: Kind) -> list[Finding]:
        """Findings of these kinds, the commonest first."""
        return sorted((f for f in self.findings.values() if f.kind in kinds), key=lambda f: -f.count)

    def left_out(self) -> int:
        """Rows that are not trained on; ``read`` is ``kept`` plus these."""
        return sum(finding.count for finding in self.of(*_LEFT_OUT))

    def lines(self) -> Iterator[str]:
        """The account in sentences, every reason with its count and its first rows."""
        yield from self.found
        share = self.supervised / self.tokens if self.tokens else 0.0
        learned = f", {share:.0%} of them learned" if self.supervised else ""  # of prompts nothing is
        yield f"{self.kept:,} of {self.read:,} rows kept, {self.tokens:,} tokens{learned}"
        for finding in self.of(*_LEFT_OUT):
            yield f"{finding.count:,} dropped: {finding.message} ({finding.places()})"
        if self.remainder:
            yield f"{self.remainder:,} tokens behind the last full block left out"
        for finding in self.of("cut", "note"):
            yield f"{finding.count:,} rows: {finding.message} ({finding.places()})"

    def raise_fatal(self, policy: Policy) -> None:
        """Raise DataError with every finding that the policy does not let pass, all at once."""
        fatal = self.of(*_FATAL[policy])
        if not fatal:
            return
        count = sum(finding.count for finding in fatal)
        rows = [_sentence(finding, *row) for finding in fatal for row in finding.rows[:_SHOWN]]
        more = count - len(rows)
        listed = "\n  ".join(rows) + (f"\n  and {more:,} more" if more else "")
        raise DataError(
            f"{count:,} of {self.read:,} rows cannot be trained on:\n  {listed}\n"
            "mend them, or leave them out with on_bad_row=drop; `tunesmith check` lists all of them"
        )

    def to_dict(self) -> dict[str, Any]:
        """The account for machines: rows as ``file:line`` strings."""
        return {
            "read": self.read,
            "kept": self.kept,
            "tokens": self.tokens,
            "supervised": self.supervised,
            "remainder": self.remainder,
            "found": self.found,
            "findings": [
                {"kind": f.kind, "code": f.code, "message": f.message, "fix": f.fix, "count": f.count,
                 "rows": [place(*row) for row in f.rows[:LISTED]]}
                for f in self.findings.values()
            ],
        }  # fmt: skip


def pack_report(report: DataReport) -> dict[str, Any]:
    """A report as plain values from which ``unpack_report`` makes it again."""
    values: dict[str, Any] = {name: getattr(report, name) for name in _NUMBERS}
    findings = [
        [f.kind, f.code, f.message, f.fix, f.count, [[s.dataset, s.file, s.row, s.line, column] for s, column in f.rows]]
        for f in report.findings.values()
    ]
    return {**values, "found": report.found, "findings": findings}


def unpack_report(values: dict[str, Any]) -> DataReport:
    """The report that ``pack_report`` packed."""
    report = DataReport(**{name: values[name] for name in _NUMBERS}, found=list(values["found"]))
    for kind, code, message, fix, count, rows in values["findings"]:
        listed = [(Source(*row[:4]), row[4]) for row in rows]
        report.findings[kind, message] = Finding(kind, code, message, fix, count, listed)
    return report


_NUMBERS = ("read", "kept", "tokens", "supervised", "remainder")


def place(source: Source, column: int | None = None) -> str:
    """``file:line (row N)``, with the column where there is one."""
    if column is None:
        return str(source)
    return f"{source.file}:{source.line}:{column} (row {source.row})" if source.line else f"{source}, column {column}"


def _sentence(finding: Finding, source: Source, column: int | None) -> str:
    return f"{place(source, column)}: {finding.message}{'. ' + finding.fix if finding.fix else ''}"


def reasons(findings: Sequence[Finding]) -> str:
    """Messages with their counts, for an error that sums up."""
    return "\n  ".join(f"{f.count:,} rows: {f.message} ({f.places()})" for f in findings)

"""What became of conversations that were checked, and how it is told."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Outcome = Literal["certified", "refused", "wrong"]

_NUMBER = re.compile(r"\b\d+\b")
_NAME_WIDTH = 46
_REASON_WIDTH = 70
_ROWS_SHOWN = 3
_TOTALS = ("certified", "refused", "wrong", "turns", "exact_turns")


@dataclass(frozen=True, slots=True)
class Judged:
    """One conversation with one template.

    Attributes:
        outcome: what became of it.
        reason: why it was refused, or what is wrong.
        turns: turns that are learned.
        exact: those of which beginning and end are known to the character, because they stand as serving would have it.
        number: of the conversation.
        differences: between the template's marks and what would be learned without them.
    """

    outcome: Outcome
    reason: str = ""
    turns: int = 0
    exact: int = 0
    number: int = 0
    differences: tuple[str, ...] = ()


@dataclass(slots=True)
class TemplateResult:
    """All conversations with one template."""

    name: str
    rows: list[Judged] = field(default_factory=list)

    def count(self, outcome: Outcome) -> int:
        """Rows with that outcome."""
        return sum(row.outcome == outcome for row in self.rows)

    def reason(self, outcome: Outcome) -> str:
        """The most frequent reason for an outcome; numbers in it are left out."""
        reasons = Counter(_NUMBER.sub("N", row.reason) for row in self.rows if row.outcome == outcome)
        return reasons.most_common(1)[0][0] if reasons else ""

    def to_dict(self) -> dict[str, Any]:
        """The entry of ``--json``."""
        return {
            "template": self.name,
            "certified": self.count("certified"),
            "refused": self.count("refused"),
            "wrong": self.count("wrong"),
            "turns": sum(row.turns for row in self.rows),
            "exact_turns": sum(row.exact for row in self.rows),
            "marks": dict(Counter(difference for row in self.rows for difference in row.differences)),
            "refused_reason": self.reason("refused"),
            "wrong_rows": [{"conversation": r.number, "reason": r.reason} for r in self.rows if r.outcome == "wrong"],
        }


def totals(results: Sequence[TemplateResult]) -> dict[str, Any]:
    """Sums over all templates; ``marks`` by kind of difference."""
    entries = [result.to_dict() for result in results]
    marks: Counter[str] = Counter()
    for entry in entries:
        marks.update(entry["marks"])
    return {"templates": len(entries), **{key: sum(entry[key] for entry in entries) for key in _TOTALS}, "marks": dict(marks)}


HEADING = f"{'template':{_NAME_WIDTH}} certified refused wrong  main reason of refusals"


def lines(result: TemplateResult) -> list[str]:
    """A template's line of the table, what is wrong, and why nothing could be certified."""
    entry = result.to_dict()
    name, reason = _short(result.name, _NAME_WIDTH), _short(entry["refused_reason"], _REASON_WIDTH)
    row = f"{name:{_NAME_WIDTH}} {entry['certified']:9} {entry['refused']:7} {entry['wrong']:5}  {reason}".rstrip()
    wrong = [f"    WRONG: conversation {r['conversation']}: {r['reason']}" for r in entry["wrong_rows"][:_ROWS_SHOWN]]
    whole = [f"    REFUSED: {result.rows[0].reason}"] if entry["refused"] == len(result.rows) and result.rows else []
    return [row, *wrong, *whole]


def summary(results: Sequence[TemplateResult]) -> list[str]:
    """The totals in words."""
    total = totals(results)
    told = [
        f"{total['templates']} templates: {total['certified']:,} conversations certified, {total['refused']:,} refused, "
        f"{total['wrong']:,} wrong",
        f"{total['turns']:,} turns learned; {total['exact_turns']:,} known to the character (by marks, or as serving has them)",
    ]
    return told + [f"certified, and {difference}: {count:,} conversations" for difference, count in total["marks"].items()]


def _short(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."

"""``trainer_log.jsonl``: one object a logged step, the truth that plots, reports and pages read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LOG_NAME = "trainer_log.jsonl"


class RunLog:
    """Appends to a run's log.

    Args:
        run: the run folder.
        resume_step: keep earlier lines up to this step; 0 starts a new log.
    """

    def __init__(self, run: Path, resume_step: int = 0) -> None:
        self.path = run / LOG_NAME
        kept = [entry for entry in read_log(run) if entry["current_steps"] <= resume_step] if resume_step else []
        scratch = self.path.with_suffix(".partial")
        scratch.write_text("".join(_line(entry) for entry in kept), encoding="utf-8")
        scratch.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, entry: dict[str, Any]) -> None:
        """Append one line; it is on its way to disk when this returns."""
        self._file.write(_line(entry))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n"


def read_log(run: Path) -> list[dict[str, Any]]:
    """All complete lines of a run's log; a line cut short by a crash is passed over."""
    entries = []
    path = run / LOG_NAME
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(entry, dict) and "current_steps" in entry:
            entries.append(entry)
    return entries

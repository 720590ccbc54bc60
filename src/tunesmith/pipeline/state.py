"""``pipeline.json``: which stages were begun, with which settings, from which earlier results, and how they ended."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from tunesmith.errors import CheckpointError

STATE = "pipeline.json"


@dataclass(frozen=True)
class Record:
    """What is known of a stage that was begun.

    Attributes:
        run: its folder.
        status: ``running`` also where the machine went down.
        settings: every key that may change the result and is not at its default.
        data: SHA-256 of its data files.
        made_from: earlier stage -> when the making of it began, which tells one making from another.
        began: when this making of it began; going on after a stop is the same making.
        exit_status: of the last attempt.
        seconds: that all attempts took together.
    """

    run: str
    status: Literal["running", "finished", "stopped"]
    settings: dict[str, Any]
    data: list[str]
    made_from: dict[str, str]
    began: str
    exit_status: int | None = None
    seconds: float = 0.0


@dataclass
class State:
    """All records, kept in a file."""

    folder: Path
    file: str
    records: dict[str, Record] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, file: Path) -> State:
        """What an earlier call left in ``folder``. Raises CheckpointError when it cannot be read."""
        path = folder / STATE
        if not path.is_file():
            return cls(folder, str(file))
        try:
            found = json.loads(path.read_text(encoding="utf-8"))["stages"]
            return cls(folder, str(file), {name: Record(**record) for name, record in found.items()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path}: cannot be read ({error}); remove it, and give the run folders of its stages up, too, or give another "
                "output_dir"
            ) from None

    def put(self, name: str, record: Record) -> None:
        """Keep a record, on disk when this returns."""
        self.records[name] = record
        self.write()

    def close(self, name: str, exit_status: int, seconds: float) -> None:
        """A stage has ended, well or not."""
        record = self.records[name]
        status: Literal["finished", "stopped"] = "finished" if exit_status == 0 else "stopped"
        self.put(name, replace(record, status=status, exit_status=exit_status, seconds=round(record.seconds + seconds, 1)))

    def write(self) -> None:
        """Replace the file by one that is whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path, scratch = self.folder / STATE, self.folder / f".{STATE}.partial"
        stages = {name: asdict(record) for name, record in self.records.items()}
        text = json.dumps({"made_by": "tunesmith", "file": self.file, "stages": stages}, indent=2, ensure_ascii=False)
        with scratch.open("w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)


def now() -> str:
    """This moment, to the microsecond, in UTC."""
    return datetime.now(UTC).isoformat(timespec="microseconds")

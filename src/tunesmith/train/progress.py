"""What a person sees while the loop runs: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import re
import sys
import time
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

_PLAIN_INTERVAL = 10.0
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but for line ends and tabs, changes of the direction of writing, halves of characters."""


class Reporter(Protocol):
    """Receives what the loop has to tell."""

    def note(self, text: str) -> None:
        """A sentence."""

    def start(self, total_steps: int, done: int) -> None:
        """The loop begins."""

    def logged(self, entry: dict[str, Any]) -> None:
        """A line of the log was written."""

    def stop(self) -> None:
        """The loop has ended, or failed."""


def printable(text: str) -> str:
    """The text with nothing in it that a terminal would obey: answers of a model and names of files can hold anything.

    Example:
        An escape character becomes a replacement character; line ends and tabs stay.
    """
    return _OBEYED.sub("\ufffd", text)


def format_entry(entry: dict[str, Any]) -> str:
    """A log line in one line of text."""
    parts = []
    if "loss" in entry:
        parts.append(f"loss {entry['loss']:.4f}")
    for key in ("reward", "eval_loss", "eval_reward"):
        if key in entry:
            parts.append(f"{key} {entry[key]:.4f}")
    if "learning_rate" in entry:
        parts.append(f"lr {entry['learning_rate']:.2e}")
    if "tokens_per_second" in entry:
        parts.append(f"{entry['tokens_per_second']:,.0f} tok/s")
    if entry.get("remaining_time"):
        parts.append(f"{entry['remaining_time']} left")
    return "  ".join(parts)


class SilentReporter:
    """Says nothing."""

    def note(self, text: str) -> None:
        """Ignore."""

    def start(self, total_steps: int, done: int) -> None:
        """Ignore."""

    def logged(self, entry: dict[str, Any]) -> None:
        """Ignore."""

    def stop(self) -> None:
        """Ignore."""


class ConsoleReporter:
    """Rich bar on a terminal; otherwise at most one plain line every ten seconds. Use as a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=False, highlight=False, soft_wrap=True)
        self._live = self.console.is_terminal and _can_draw()
        self._progress: Progress | None = None
        self._task: Any = None
        self._total = 0
        self._last_line = 0.0

    def __enter__(self) -> ConsoleReporter:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def note(self, text: str) -> None:
        """Print a sentence above the bar."""
        self.console.print(Text(printable(text)))

    def start(self, total_steps: int, done: int) -> None:
        """Show the bar."""
        self._total = total_steps
        if self._live:
            columns = (
                TextColumn("training"),
                BarColumn(),
                TaskProgressColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self._progress = Progress(*columns, console=self.console, transient=False)
            self._task = self._progress.add_task("", total=total_steps, completed=done, text="")
            self._progress.start()

    def logged(self, entry: dict[str, Any]) -> None:
        """Advance the bar, or print a line if the last one is old enough or says something rare."""
        step, text = entry["current_steps"], format_entry(entry)
        if self._progress is not None:
            if _evaluated(entry):
                self.note(f"step {step}/{self._total}  {text}")
            else:
                self._progress.update(self._task, completed=step, text=text)
            return
        now = time.monotonic()
        if _evaluated(entry) or step == self._total or now - self._last_line >= _PLAIN_INTERVAL:
            self._last_line = now
            self.note(f"step {step}/{self._total}  {text}")

    def stop(self) -> None:
        """Leave the cursor as it was."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _evaluated(entry: dict[str, Any]) -> bool:
    return "eval_loss" in entry or "eval_reward" in entry


def _can_draw() -> bool:
    return (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf8")

"""Contenders run by turns: one update each, round after round, so that a slow moment of the machine hits all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from benchmarks import ROOT
from benchmarks.machine import highest_memory

TRL = "1.16.0"


@dataclass
class Contender:
    """A trainer in a process of its own.

    Attributes:
        name: as it is printed.
        command: that starts it.
        ready: what it said when all was loaded.
        answers: to each measured update.
        threads: of its own; None takes those of the run.
    """

    name: str
    command: list[str]
    ready: dict[str, Any] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)
    threads: int | None = None
    _process: subprocess.Popen[str] | None = None
    _errors: IO[str] | None = None

    def start(self, env: dict[str, str]) -> None:
        """Load everything."""
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115  # lives as long as the process
        self._process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, cwd=ROOT, env=env
        )
        self.ready = self._answer()

    def step(self, measured: bool) -> None:
        """Make an update."""
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        found = self._answer()
        if measured:
            self.answers.append(found)

    def peak(self) -> float:
        """Highest resident memory of the process so far, MiB."""
        assert self._process is not None
        return highest_memory(self._process.pid)

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout, self._errors):
                assert stream is not None
                stream.close()

    @property
    def seconds(self) -> list[float]:
        """Of each measured update."""
        return [answer["seconds"] for answer in self.answers]

    @property
    def tokens(self) -> list[int]:
        """Real ones of each measured update."""
        return [answer["tokens"] for answer in self.answers]

    @property
    def losses(self) -> list[float]:
        """Of each measured update."""
        return [answer["loss"] for answer in self.answers]

    @property
    def speed(self) -> float:
        """Real tokens a second."""
        return sum(self.tokens) / sum(self.seconds)

    def _answer(self) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None and self._errors is not None
        while line := self._process.stdout.readline():
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        self._errors.seek(0)
        raise SystemExit(f"{self.name} ended:\n{self._errors.read()[-3000:]}")


def environment(threads: int) -> dict[str, str]:
    """What contenders are started with: the same threads, nothing from the network."""
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def trl_python() -> Path:
    """Python of a virtual environment that has TRL, made where it is missing."""
    folder = ROOT / ".venv-trl"
    python = folder / "bin" / "python"
    if not python.exists() or subprocess.run([str(python), "-c", "import trl"], capture_output=True).returncode:
        venv.create(folder, with_pip=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "-c", str(ROOT / "requirements/constraints.txt")]
        subprocess.run([*install, "torch", "peft", f"trl=={TRL}"], check=True)
    return python


def contender(name: str, script: str, arguments: list[str], python: Path | None = None) -> Contender:
    """A contender of ``benchmarks/contenders``, run by another Python where that is given."""
    return Contender(name, [str(python or sys.executable), "-m", f"benchmarks.contenders.{script}", *arguments])


def take_turns(contenders: list[Contender], warm_up: int, rounds: int, threads: int) -> dict[str, float]:
    """Run them; returns the highest memory of each, MiB."""
    try:
        for one in contenders:
            one.start(environment(one.threads or threads))
        for number in range(warm_up + rounds):
            for one in contenders:
                one.step(measured=number >= warm_up)
        return {one.name: one.peak() for one in contenders}
    finally:
        for one in contenders:
            one.stop()

"""Exports whose comparison runs in this process: the same code, without the seconds that a fresh one takes to start."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import tunesmith
from tunesmith.export.export import ExportOptions, export
from tunesmith.model.gguf_restore import vocabulary
from tunesmith.verify import gguf, plain
from tunesmith.verify.gguf import GgufProof
from tunesmith.verify.merge import Check, Proof, judge


class CheckHere(Check):
    """The comparison of ``verify/plain.py``, called as a function."""

    def prove(self, folder: Path, dtype: Any, tolerance: float | None = None, adapter: bool = False) -> Proof:
        return judge(plain.compare({**self.asked(folder, adapter), "new_tokens": 2}), dtype, tolerance)

    def prove_gguf(self, folder: Path, file: Path, kind: Any, tolerance: float | None = None) -> GgufProof:
        with tempfile.TemporaryDirectory() as scratch:
            found = plain.compare({**gguf.asked(folder, file, Path(scratch), self.tokenizer), "new_tokens": 2})
        return gguf.judge(found, kind, gguf.differences(vocabulary(file), self.tokenizer), tolerance)


@pytest.fixture
def export_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Path, list[str]]]:
    """Export a folder with options; returns the output and what was said."""

    monkeypatch.setattr(plain, "gc", SimpleNamespace(collect=lambda: 0))  # goes through all that the tests have imported

    def run(target: Path, output: Path | None = None, **options: Any) -> tuple[Path, list[str]]:
        said: list[str] = []
        return export(target, output or tmp_path / "out", ExportOptions(**options), CheckHere, said.append), said

    return run


@pytest.fixture
def trained(settings: dict[str, Any], write_config: Any) -> Callable[..., Path]:
    """Train a little with changed settings; returns the run folder."""

    def train(**changes: Any) -> Path:
        settings.update({"max_steps": 1, "save_steps": 100, **changes})
        tunesmith("train", write_config(settings))
        return Path(settings["output_dir"])

    return train


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }

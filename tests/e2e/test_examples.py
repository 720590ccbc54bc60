"""The examples of reward models and preferences: they run as they are, and all of their data is good."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, tunesmith
from tunesmith.stages import reference
from tunesmith.train.runlog import read_log

EXAMPLES = ROOT / "examples"


@pytest.mark.parametrize(("stage", "loss"), [("rm", 0.6931), ("dpo", 0.6931), ("kto", 0.6)])
def test_it_trains(stage: str, loss: float, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "cache_root", lambda: tmp_path / "cache")
    changes = [f"model_name_or_path={tiny_model}", f"dataset_dir={EXAMPLES / 'data'}", f"output_dir={tmp_path / 'run'}"]
    path = EXAMPLES / f"{stage}_lora.yaml"
    done = tunesmith("train", path, *changes, "max_steps=3")
    assert "40 of 40 rows kept" in done.stdout
    log = read_log(tmp_path / "run")
    assert next(entry["eval_loss"] for entry in log if "eval_loss" in entry) == pytest.approx(loss, abs=2e-3)
    assert len([entry for entry in log if "loss" in entry]) == 3
    assert (tmp_path / "run/training_loss.png").is_file()
    found = json.loads(tunesmith("check", path, *changes, "--json").stdout)
    assert not found["errors"] and found["plan"]["memory"]["fits"]


def test_feedback_is_one_answer_of_each_pair() -> None:
    pairs, feedback = (read(name) for name in ("preferences", "feedback"))
    assert len(pairs) == len(feedback) == 40
    for number, (pair, row) in enumerate(zip(pairs, feedback, strict=True)):
        good = number % 5 < 3
        assert row == {"instruction": pair["instruction"], "output": pair["chosen" if good else "rejected"], "desirable": good}


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (EXAMPLES / f"data/{name}.jsonl").read_text(encoding="utf-8").splitlines()]

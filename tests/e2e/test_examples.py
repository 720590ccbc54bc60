"""The examples of reward models, preferences and policies: they run as they are, and all of their data is good."""

from __future__ import annotations

import json
import re
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


@pytest.mark.parametrize(("stage", "rows", "held_out"), [("ppo", 60, 16), ("grpo", 80, 24)])
def test_a_policy_trains(stage: str, rows: int, held_out: int, tiny_model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    changes = [f"model_name_or_path={tiny_model}", f"dataset_dir={EXAMPLES / 'data'}", f"output_dir={run}"]
    path = EXAMPLES / f"{stage}_lora.yaml"
    done = tunesmith("train", path, *changes, "max_steps=2", "max_new_tokens=8")
    assert f"{rows} of {rows} rows kept" in done.stdout
    log = read_log(run)
    assert [entry["current_steps"] for entry in log if "eval_reward" in entry] == [0, 2]
    first = next(entry for entry in log if "loss" in entry)
    assert first["policy_kl"] == 0 and 0 <= first["reward"] <= 1
    answers = [json.loads(line) for line in (run / "eval_answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(answers) == held_out
    found = json.loads(tunesmith("check", path, *changes, "--json").stdout)
    assert not found["errors"] and found["plan"]["memory"]["fits"]


def test_sums_are_right() -> None:
    rows = read("sums")
    assert len({row["instruction"] for row in rows}) == len(rows) == 80
    for row in rows:
        question = row["instruction"]
        first, second = map(int, re.findall(r"\d+", question))
        if re.search("times|Multiply|Each of|每盒", question):
            expected = first * second
        elif re.search(" - |minus|away|spent|eat|减|吃掉", question):
            expected = abs(first - second)
        else:
            expected = first + second
        assert row["output"] == str(expected), question


def test_feedback_is_one_answer_of_each_pair() -> None:
    pairs, feedback = (read(name) for name in ("preferences", "feedback"))
    assert len(pairs) == len(feedback) == 40
    for number, (pair, row) in enumerate(zip(pairs, feedback, strict=True)):
        good = number % 5 < 3
        assert row == {"instruction": pair["instruction"], "output": pair["chosen" if good else "rejected"], "desirable": good}


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (EXAMPLES / f"data/{name}.jsonl").read_text(encoding="utf-8").splitlines()]

"""The walkthrough's data are those that its script writes, and its pipeline is sound."""

from __future__ import annotations

import importlib.util
import json
from types import ModuleType

import pytest

from tests.conftest import ROOT
from tunesmith.config.pipeline import load_pipeline

FOLDER = ROOT / "examples/rlhf_walkthrough"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_data", FOLDER / "make_data.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_data_are_those_that_the_script_writes(script: ModuleType) -> None:
    made = script.files()
    assert {path.name: path.read_text(encoding="utf-8") for path in (FOLDER / "data").iterdir()} == made
    assert sum(map(len, made.values())) < 200_000


def test_the_better_answer_is_the_kind_one_and_half_of_the_questions_are_new(script: ModuleType) -> None:
    rows = {name: [json.loads(line) for line in text.splitlines()] for name, text in script.files().items() if name[-1] == "l"}
    true = {question: fact[0] for fact in script.FACTS for question in fact[2:5]}
    for row in rows["pairs.jsonl"]:
        assert row["chosen"].startswith(true[row["instruction"]]) and row["chosen"].endswith(tuple(script.KIND))
        said = row["rejected"].startswith(true[row["instruction"]])
        assert not (said and row["rejected"].endswith(tuple(script.KIND)))
    asked = {row["instruction"] for name in ("dialogues.jsonl", "pairs.jsonl") for row in rows[name]}
    new = [row["instruction"] for row in rows["questions.jsonl"] if row["instruction"] not in asked]
    assert len(new) == len(script.FACTS) == len(rows["questions.jsonl"]) / 2
    kind = [row["output"].endswith(tuple(script.KIND)) for row in rows["dialogues.jsonl"]]
    assert sum(kind) == len(kind) / 2


def test_the_stages_go_on_from_each_other() -> None:
    made = load_pipeline(FOLDER / "pipeline.yaml")
    assert [(stage.config.finetuning.stage, stage.uses) for stage in made.stages] == [
        ("pt", ()), ("sft", ("pretrain",)), ("rm", ("sft",)), ("ppo", ("sft", "reward"))
    ]  # fmt: skip
    assert made.notices == ()

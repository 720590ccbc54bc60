"""``tunesmith predict``: scores of a file, from a run of a reward model."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import tunesmith, write_dataset
from tests.e2e.test_reward_model import COLUMNS, pairs
from tunesmith import Conversation, Message, ModelArguments, Source, load_reward_model

LONG = "the cat " * 600


@pytest.fixture
def run(settings: dict[str, Any], write_config: Any, request: pytest.FixtureRequest) -> Path:
    write_dataset(Path(settings["dataset_dir"]), pairs(12), "pairs", ranking=True, columns=COLUMNS)
    values = {
        **settings, "stage": "rm", "dataset": "pairs", "val_size": 6, "eval_strategy": "epoch", "default_system": "green hills",
        "num_train_epochs": 3, "learning_rate": 3e-3, "template_date": "2026-01-02",
        "finetuning_type": getattr(request, "param", "lora"),
    }  # fmt: skip
    tunesmith("train", write_config(values))
    return Path(values["output_dir"])


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("run", ["lora", "full", "freeze"], indirect=True)
def test_scores_are_those_of_the_evaluation(run: Path, tmp_path: Path) -> None:
    """The run's own system message and template; the file's order, though longer rows are computed first."""
    file = run.parent / "data/pairs.jsonl"
    done = tunesmith("predict", run, file)
    written = Path(done.stdout.splitlines()[-1])
    assert written == run / "scores-pairs.jsonl"
    found = {entry["row"].rpartition("/")[2]: entry for entry in read(written)}
    assert list(found) == [f"pairs.jsonl:{n} (row {n})" for n in range(1, 13)]
    for entry in read(run / "eval_scores.jsonl"):
        scored = found[entry["row"].rpartition("/")[2]]
        assert [scored["chosen"], scored["rejected"]] == pytest.approx([entry["chosen"], entry["rejected"]], abs=1e-5)
    right = sum(entry["chosen"] > entry["rejected"] for entry in found.values())
    margin = sum(entry["chosen"] - entry["rejected"] for entry in found.values()) / 12
    assert "12 of 12 rows scored" in done.stdout
    assert f"accuracy {right / 12:.4f}" in done.stdout and f"mean margin {margin:.4f}" in done.stdout
    again = tunesmith("predict", run, file, check=False)
    assert again.returncode and "--overwrite" in again.stderr
    other = tmp_path / "other.jsonl"
    if not (run / "adapter_config.json").is_file():  # a whole model has no base
        refused = tunesmith("predict", run, file, "model_name_or_path=other", "--overwrite", check=False)
        assert refused.returncode and "model_name_or_path: without effect" in refused.stderr
    tunesmith("predict", run, "pairs", "--output", other)  # by the name in dataset_info.json
    assert [entry["chosen"] for entry in read(other)] == [entry["chosen"] for entry in found.values()]


def test_single_answers_feedback_texts_and_what_is_left_out(run: Path, tmp_path: Path) -> None:
    rows = pairs(12)
    expected = read(Path(tunesmith("predict", run, run.parent / "data/pairs.jsonl").stdout.splitlines()[-1]))
    table = tmp_path / "answers.csv"
    with table.open("w", encoding="utf-8", newline="") as sink:
        csv.writer(sink).writerows([["instruction", "output"], *([row["instruction"], row["chosen"]] for row in rows)])
    found = read(Path(tunesmith("predict", run, table).stdout.splitlines()[-1]))
    assert [e["score"] for e in found] == pytest.approx([e["chosen"] for e in expected], abs=1e-5)

    judged = tmp_path / "judged.jsonl"
    bad = [{"instruction": "a cat", "output": "", "label": True}, {"instruction": LONG, "output": "cat", "label": True}]
    lines = [{"instruction": r["instruction"], "output": r["rejected"], "label": i % 2} for i, r in enumerate(rows)]
    judged.write_text("".join(json.dumps(line) + "\n" for line in [*lines, *bad]) + "{oops\n", encoding="utf-8")
    done = tunesmith("predict", run, judged)
    found = read(Path(done.stdout.splitlines()[-1]))
    assert [e["score"] for e in found] == pytest.approx([e["rejected"] for e in expected], abs=1e-5)
    assert [e["desirable"] for e in found] == [bool(i % 2) for i in range(12)]
    means = [torch.tensor([e["score"] for e in found if e["desirable"] is kind]).mean() for kind in (False, True)]
    assert f"12 of 15 rows scored; mean score: bad {means[0]:.4f}, good {means[1]:.4f}" in done.stdout
    for reason in ("judged.jsonl:13", "longer than the 512 tokens", "judged.jsonl:14", "judged.jsonl:15"):
        assert reason in done.stdout

    texts = tmp_path / "texts.txt"
    texts.write_text("the cat sat\n你好 世界\n", encoding="utf-8")
    assert [set(entry) for entry in read(Path(tunesmith("predict", run, texts).stdout.splitlines()[-1]))] == [
        {"row", "score"}
    ] * 2


@pytest.mark.parametrize("beneath", ["lora", "freeze"])
def test_what_a_run_went_on_from_may_be_gone(settings: dict[str, Any], write_config: Any, tmp_path: Path, beneath: str) -> None:
    """An adapter is contained in the run's own; weights of a freeze run are not."""
    first = {**settings, "finetuning_type": beneath, "output_dir": str(tmp_path / "first"), "max_steps": 2}
    tunesmith("train", write_config(first))
    folder = write_dataset(Path(settings["dataset_dir"]), pairs(12), "pairs", ranking=True, columns=COLUMNS)
    values = {
        **settings,
        "stage": "rm",
        "dataset": "pairs",
        "checkpoint_dir": first["output_dir"],
        "resume_lora_training": False,
    }
    tunesmith("train", write_config(values))
    run, file = values["output_dir"], folder / "pairs.jsonl"
    expected = read(Path(tunesmith("predict", run, file).stdout.splitlines()[-1]))
    (tmp_path / "first").rename(tmp_path / "away")
    done = tunesmith("predict", run, file, "--overwrite", check=beneath == "lora")
    if beneath == "lora":
        assert read(Path(done.stdout.splitlines()[-1])) == expected
        assert tunesmith("chat", run, "--prompt", "the cat").returncode == 0
        tunesmith("export", run, "--output", tmp_path / "whole")
        whole = ModelArguments(model_name_or_path="none", reward_model=str(tmp_path / "whole"), reward_model_type="full")
        asked = Message("user", pairs(12)[0]["instruction"])
        first_pair = Conversation((asked, Message("assistant", pairs(12)[0]["chosen"])), Source("", "", 1, 1))
        scored = load_reward_model(whole).scores([first_pair]).item()
        assert scored == pytest.approx(expected[0]["chosen"], abs=2e-3)  # weights are rounded
    else:
        assert done.returncode and "first" in done.stderr


def test_what_cannot_score_is_told(run: Path, settings: dict[str, Any], write_config: Any, tmp_path: Path) -> None:
    file = run.parent / "data/rows.jsonl"
    supervised = {**settings, "output_dir": str(tmp_path / "sft"), "max_steps": 1}
    path = write_config(supervised)
    tunesmith("train", path)
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"instruction": "a", "output": ""}\n', encoding="utf-8")
    for arguments, reason in (
        ((tmp_path / "sft", file), "stage sft, which has no value head"),
        ((path, file), "stage sft, which has no value head"),
        ((run.parent / "data", file), "no run"),
        ((run, file, "learning_rate=1"), "learning_rate: without effect"),
        ((run, tmp_path / "none.jsonl"), "none.jsonl"),
        ((run, empty), "nothing that can be scored"),
        ((run, file, "--output", file, "--overwrite"), "is the file that is scored"),
    ):
        done = tunesmith("predict", *arguments, check=False)
        assert done.returncode and reason in done.stderr, (arguments, done.stderr)
    assert not list(run.glob("*scores-*"))


def test_a_runs_word_is_no_consent_to_run_code(run: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    base = Path(shutil.copytree(settings["model_name_or_path"], tmp_path / "base"))
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}}
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (base / "mine.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()\n", encoding="utf-8")
    for file in (run / "config.yaml", run / "adapter_config.json"):
        text = file.read_text(encoding="utf-8").replace(settings["model_name_or_path"], str(base))
        file.write_text(text.replace("trust_remote_code: false", "trust_remote_code: true"), encoding="utf-8")
    done = tunesmith("predict", run, run.parent / "data/pairs.jsonl", check=False)
    assert done.returncode and "trust_remote_code" in done.stderr
    assert not (tmp_path / "ran").exists()
    tunesmith("predict", run, run.parent / "data/pairs.jsonl", "trust_remote_code=true", check=False)
    assert (tmp_path / "ran").exists()

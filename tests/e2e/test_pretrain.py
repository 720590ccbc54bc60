"""``stage: pt`` from text file to perplexity."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import make_rows, tunesmith
from tunesmith.train.runlog import read_log


@pytest.fixture
def pretraining(settings: dict[str, Any]) -> dict[str, Any]:
    folder = Path(settings["dataset_dir"])
    text = "".join(row["output"] + "\n\n" for row in make_rows(120, 5))
    (folder / "corpus.txt").write_text(text, encoding="utf-8")
    (folder / "dataset_info.json").write_text(json.dumps({"corpus": {"file_name": "corpus.txt"}}), encoding="utf-8")
    return {**settings, "stage": "pt", "dataset": "corpus", "cutoff_len": 64, "val_size": 0.2, "eval_strategy": "epoch",
            "eval_on_start": True}  # fmt: skip


def test_perplexity_falls_and_is_the_exponential_of_the_loss(pretraining: dict[str, Any], write_config: Any) -> None:
    done = tunesmith("train", write_config(pretraining), "plot_loss=true")
    run = Path(pretraining["output_dir"])
    evaluations = [e for e in read_log(run) if "eval_loss" in e]
    assert evaluations[-1]["eval_perplexity"] < 0.8 * evaluations[0]["eval_perplexity"]
    for entry in evaluations:
        assert entry["eval_perplexity"] == pytest.approx(math.exp(entry["eval_loss"]))
    assert "perplexity" in done.stdout
    assert (run / "training_loss.png").is_file()
    report = json.loads((run / "data_report.json").read_text())
    assert report["read"] == report["kept"] == 120
    assert 0 < report["remainder"] < 2 * 64


FULL = {"finetuning_type": "full", "learning_rate": 1e-3, "cutoff_len": 128, "max_samples": 20, "val_size": 2, "max_steps": 12}
LORA = {"learning_rate": 5e-4, "cutoff_len": 256, "max_samples": 10, "val_size": 1, "max_steps": 12, "compute_dtype": "auto"}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["wiki_demo", "c4_demo"])
@pytest.mark.parametrize(
    ("model", "changes", "below"),
    [
        ("{shared}/models/stories260K", FULL, 0.7),
        pytest.param("builtin:smollm2-135m", LORA, 0.99, marks=pytest.mark.slow),
    ],
    ids=["stories260K", "smollm2"],
)
def test_real_text_lowers_held_out_perplexity(
    settings: dict[str, Any], write_config: Any, shared: Path, name: str, model: str, changes: dict[str, Any], below: float
) -> None:
    settings.update(changes, stage="pt", dataset=name, dataset_dir=str(shared / "data/demo"), lr_scheduler_type="constant")
    settings.update(model_name_or_path=model.format(shared=shared), eval_steps=12, eval_on_start=True)
    if name == "c4_demo":
        settings.update(max_samples=3 * settings["max_samples"], val_size=3 * settings["val_size"])  # shorter documents
    tunesmith("train", write_config(settings))
    before, after = (e["eval_perplexity"] for e in read_log(Path(settings["output_dir"])) if "eval_loss" in e)
    assert after < below * before


def test_a_stopped_run_goes_on(pretraining: dict[str, Any], write_config: Any) -> None:
    pretraining.update(lr_scheduler_type="constant", save_steps=2, per_device_train_batch_size=2)
    tunesmith("train", write_config(pretraining))
    whole = [e["loss"] for e in read_log(Path(pretraining["output_dir"])) if "loss" in e]
    pretraining["output_dir"] += "-stopped"
    tunesmith("train", write_config(pretraining), "max_steps=3")
    tunesmith("train", write_config(pretraining), "resume_from_checkpoint=auto")
    assert [e["loss"] for e in read_log(Path(pretraining["output_dir"])) if "loss" in e] == whole


def test_too_little_text_is_an_error(pretraining: dict[str, Any], write_config: Any) -> None:
    done = tunesmith("train", write_config(pretraining), "cutoff_len=100000", check=False)
    assert done.returncode == 2
    assert "do not fill one block" in done.stderr


def test_dialogues_without_a_text_column_name_what_is_missing(settings: dict[str, Any], write_config: Any) -> None:
    folder = Path(settings["dataset_dir"])
    entry = {"rows": {"file_name": "rows.jsonl", "columns": {"prompt": "text"}}}
    (folder / "dataset_info.json").write_text(json.dumps(entry), encoding="utf-8")
    done = tunesmith("train", write_config({**settings, "stage": "pt"}), check=False)
    assert done.returncode == 2
    assert "no column 'text'" in done.stderr

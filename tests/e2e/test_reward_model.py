"""``stage: rm`` from pairs to scores."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import WORDS, tunesmith, write_dataset
from tunesmith import Conversation, Message, ModelArguments, Source, load_reward_model
from tunesmith.config.load import load_config
from tunesmith.errors import NonFiniteError
from tunesmith.losses.pairwise import pairwise_loss
from tunesmith.model.adapter import head_of
from tunesmith.stages.run import build_trainer
from tunesmith.train.progress import SilentReporter
from tunesmith.train.runlog import read_log

COLUMNS = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}


def pairs(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """The better answer repeats the question's word, the worse one another."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        right, wrong = rng.sample(WORDS, 2)
        before = " ".join(rng.choices(WORDS, k=rng.randint(1, 6)))
        rows.append({"instruction": f"{before} {right}", "chosen": right, "rejected": " ".join([wrong] * rng.randint(1, 4))})
    return rows


@pytest.fixture
def rewarding(settings: dict[str, Any]) -> dict[str, Any]:
    write_dataset(Path(settings["dataset_dir"]), pairs(40), "pairs", ranking=True, columns=COLUMNS)
    return {
        **settings, "stage": "rm", "dataset": "pairs", "val_size": 0.25, "eval_strategy": "epoch", "eval_on_start": True,
        "num_train_epochs": 6,
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["lora", "full", "freeze"])
def test_the_better_answer_comes_to_score_higher(rewarding: dict[str, Any], write_config: Any, kind: str) -> None:
    tunesmith("train", write_config({**rewarding, "finetuning_type": kind, "learning_rate": 3e-3}), "plot_loss=true")
    run = Path(rewarding["output_dir"])
    log = read_log(run)
    before, *_, after = [entry for entry in log if "eval_loss" in entry]
    assert before["eval_loss"] == pytest.approx(0.6931, abs=1e-4)
    assert before["eval_rewards/margins"] == before["eval_accuracy"] == 0
    assert after["eval_loss"] < 0.65
    assert after["eval_accuracy"] >= 0.7
    assert after["eval_rewards/margins"] == pytest.approx(
        after["eval_rewards/chosen"] - after["eval_rewards/rejected"], abs=1e-5
    )
    steps = [entry for entry in log if "loss" in entry]
    assert {"accuracy", "rewards/chosen", "rewards/rejected", "rewards/margins"} <= set(steps[-1])
    scores = [json.loads(line) for line in (run / "eval_scores.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(scores) == 10
    assert sum(s["chosen"] > s["rejected"] for s in scores) / len(scores) == pytest.approx(after["eval_accuracy"])
    assert (run / "value_head.safetensors").is_file()
    assert (run / "training_loss.png").is_file()


def test_the_result_scores_as_the_run_did(rewarding: dict[str, Any], write_config: Any) -> None:
    assert "talk to it" not in tunesmith("train", write_config(rewarding)).stdout
    run = rewarding["output_dir"]
    args = ModelArguments(
        model_name_or_path=rewarding["model_name_or_path"], reward_model=run, reward_model_type="lora", compute_dtype="fp32"
    )
    scorer = load_reward_model(args)
    rows = pairs(40)
    for line in (Path(run) / "eval_scores.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        row = rows[int(re.findall(r"pairs.jsonl:(\d+)", entry["row"])[0]) - 1]
        asked = Message("user", row["instruction"])
        found = scorer.scores([
            Conversation((asked, Message("assistant", row[side])), Source("pairs", "pairs", 1, 1)) for side in ("chosen", "rejected")
        ])  # fmt: skip
        torch.testing.assert_close(found, torch.tensor([entry["chosen"], entry["rejected"]]), rtol=1e-4, atol=1e-5)


def test_stopped_and_continued_is_bit_equal(rewarding: dict[str, Any], write_config: Any) -> None:
    def log(name: str, **changes: Any) -> list[tuple[Any, ...]]:
        values = {**rewarding, "output_dir": f"{rewarding['output_dir']}-{name}", "eval_on_start": False, "lora_dropout": 0.1}
        tunesmith(
            "train",
            write_config({**values, "num_train_epochs": 2, "logging_steps": 3, "lr_scheduler_type": "constant", **changes}),
        )
        entries = read_log(Path(values["output_dir"]))
        return [(e["current_steps"], e["loss"], e["accuracy"], e["rewards/margins"]) for e in entries if "loss" in e]

    unbroken = log("unbroken")
    log("stopped", max_steps=4, save_steps=4)
    assert log("stopped", resume_from_checkpoint="auto")[-3:] == unbroken[-3:]


def test_a_reward_model_is_trained_on(rewarding: dict[str, Any], write_config: Any) -> None:
    tunesmith("train", write_config(rewarding))
    first = rewarding["output_dir"]
    values = {**rewarding, "checkpoint_dir": first, "output_dir": f"{first}-on", "num_train_epochs": 1}
    tunesmith("train", write_config(values))
    last = [entry for entry in read_log(Path(first)) if "eval_loss" in entry][-1]
    again = next(entry for entry in read_log(Path(values["output_dir"])) if "eval_loss" in entry)
    assert again["eval_loss"] == pytest.approx(last["eval_loss"], rel=1e-5)


def test_accumulation_changes_no_gradient(rewarding: dict[str, Any], write_config: Any) -> None:
    norms = []
    for size, steps in ((8, 1), (4, 2), (1, 8)):
        values = {**rewarding, "per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer, _ = build_trainer(load_config(write_config(values))[0], SilentReporter())
        result = [trainer.training_step(window) for window, _ in zip(trainer.loader.windows(0), range(3), strict=False)]
        norms.append([(step.loss_sum / step.count, step.grad_norm) for step in result])
    torch.testing.assert_close(torch.tensor(norms[1]), torch.tensor(norms[0]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.tensor(norms[2]), torch.tensor(norms[0]), rtol=1e-5, atol=1e-6)


def test_the_loss_by_hand() -> None:
    rewards = torch.tensor([1.0]), torch.tensor([0.0])
    assert pairwise_loss(*rewards).item() == pytest.approx(0.3133, abs=1e-4)
    assert pairwise_loss(*rewards, centering=0.01).item() == pytest.approx(0.3233, abs=1e-4)
    assert pairwise_loss(*rewards, margins_P=torch.tensor([1.0])).item() == pytest.approx(0.6931, abs=1e-4)


@pytest.mark.parametrize("key", ["packing", "streaming", "train_on_prompt"])
def test_what_has_no_meaning_is_refused(rewarding: dict[str, Any], write_config: Any, key: str) -> None:
    done = tunesmith("train", write_config({**rewarding, key: True, "max_steps": 2}), check=False)
    assert done.returncode == 2
    assert key in done.stderr


def test_check_plans_it(rewarding: dict[str, Any], write_config: Any) -> None:
    found = json.loads(tunesmith("check", write_config(rewarding), "--json").stdout)
    assert found["plan"]["memory"]["fits"], tunesmith("check", write_config(rewarding)).stdout
    assert found["plan"]["train_examples"] == 30


def test_a_margin_from_the_data_is_asked_for(rewarding: dict[str, Any], write_config: Any) -> None:
    """Equal scores at the start: the loss is the mean of -log sigmoid(-margin)."""
    folder, columns = Path(rewarding["dataset_dir"]), {**COLUMNS, "margin": "better_by"}
    margins: list[Any] = [0, 0.5, "1.25", 3]
    rows = [{**row, "better_by": margins[i % 4]} for i, row in enumerate(pairs(8))]
    write_dataset(folder, rows, "graded", ranking=True, columns=columns)
    changes = {"dataset": "graded", "val_size": 0, "eval_strategy": "no", "per_device_train_batch_size": 8}
    trainer, _ = build_trainer(load_config(write_config({**rewarding, **changes}))[0], SilentReporter())
    step = trainer.training_step(next(trainer.loader.windows(0)))
    asked = torch.tensor([0, 0.5, 1.25, 3])
    assert step.loss_sum / step.count == pytest.approx(torch.nn.functional.softplus(asked).mean().item(), rel=1e-5)
    for wrong, shown in (("much", "'much'"), (None, "null"), (True, "true/false"), ("inf", "'inf'")):
        write_dataset(folder, [*rows, {**rows[0], "better_by": wrong}], "graded", ranking=True, columns=columns)
        done = tunesmith("train", write_config({**rewarding, **changes, "on_bad_row": "error"}), check=False)
        assert done.returncode
        assert "graded.jsonl:9" in done.stderr and f"'better_by' is {shown}, expected a finite number" in done.stderr


def test_a_loss_that_is_not_finite_names_each_pair_once(rewarding: dict[str, Any], write_config: Any) -> None:
    trainer, _ = build_trainer(load_config(write_config(rewarding))[0], SilentReporter())
    head = head_of(trainer.model)
    assert head is not None
    torch.nn.init.constant_(head.summary.weight, torch.nan)
    with pytest.raises(NonFiniteError) as caught:
        trainer.training_step(next(trainer.loader.windows(0)))
    assert str(caught.value).count("pairs.jsonl") == rewarding["per_device_train_batch_size"]

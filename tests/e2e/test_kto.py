"""``stage: kto`` from single answers, found good or bad, to a model that tells them apart."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import tunesmith, write_dataset
from tests.e2e.test_reward_model import pairs
from tests.stages.test_plan import compare
from tunesmith.config.load import load_config
from tunesmith.data.mismatched import MismatchedFeedback, crossed
from tunesmith.stages import reference
from tunesmith.stages.run import build_trainer
from tunesmith.train.progress import SilentReporter
from tunesmith.train.runlog import read_log
from tunesmith.train.trainer import PeftTrainer
from tunesmith.types import Example, Source

COLUMNS = {"prompt": "instruction", "response": "output", "kto_tag": "label"}


def feedback(count: int, good: int = 2, every: int = 4) -> list[dict[str, Any]]:
    """``good`` of each ``every`` answers are good: they repeat the question's word; the others another one."""
    return [
        {"instruction": pair["instruction"], "output": pair["chosen" if i % every < good else "rejected"], "label": i % every < good}
        for i, pair in enumerate(pairs(count))
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "cache_root", lambda: tmp_path / "cache")


@pytest.fixture
def judging(settings: dict[str, Any]) -> dict[str, Any]:
    write_dataset(Path(settings["dataset_dir"]), feedback(60), "feedback", columns=COLUMNS)
    return {
        **settings, "stage": "kto", "dataset": "feedback", "val_size": 20, "eval_strategy": "epoch", "eval_on_start": True,
        "num_train_epochs": 3, "learning_rate": 3e-3, "per_device_train_batch_size": 8, "pref_beta": 0.3,
    }  # fmt: skip


def built(settings: dict[str, Any], write_config: Any, **changes: Any) -> PeftTrainer:
    return build_trainer(load_config(write_config({**settings, **changes}))[0], SilentReporter())[0]


@pytest.mark.parametrize("changes", [{}, {"finetuning_type": "full"}, {"kto_loss": "apo_zero_unpaired"}])
def test_it_begins_at_a_half_and_comes_to_tell_good_from_bad(
    judging: dict[str, Any], write_config: Any, changes: dict[str, Any]
) -> None:
    done = tunesmith("train", write_config({**judging, **changes, "plot_loss": True}))
    assert "good and" in done.stdout and "bad answers" in done.stdout
    log = read_log(Path(judging["output_dir"]))
    first = next(entry for entry in log if "loss" in entry)
    before, *_, after = [entry for entry in log if "eval_loss" in entry]
    assert before["eval_loss"] == pytest.approx(0.5, abs=1e-4)
    assert first["loss"] == pytest.approx(0.5, abs=1e-4)
    if "kto_loss" not in changes:
        assert first["kl"] == pytest.approx(0, abs=1e-4)
        assert after["eval_kl"] >= 0
    else:
        assert all("kl" not in entry for entry in log)
    assert [entry["loss"] for entry in log if "loss" in entry][-1] < 0.4
    best = min((entry for entry in log if "eval_loss" in entry), key=lambda entry: entry["eval_loss"])
    assert best["eval_loss"] < 0.49
    assert best["eval_rewards/margins"] > 0.05
    assert after["eval_rewards/margins"] == pytest.approx(
        after["eval_rewards/chosen"] - after["eval_rewards/rejected"], abs=1e-6
    )


def test_how_rows_are_divided_changes_nothing(judging: dict[str, Any], write_config: Any) -> None:
    """The reference point is that of the whole update, so that even batches of one row give the same."""
    found, losses = [], []
    for size, steps in ((8, 1), (4, 2), (1, 8)):
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "pref_ftx": 1.0}
        trainer = built(judging, write_config, **changes, per_device_eval_batch_size=size)
        results = [trainer.training_step(window) for window in islice(trainer.loader.windows(0), 4)]
        points = [step.metrics["kl"][0] / step.metrics["kl"][1] for step in results]
        assert points[-1] > 0.1
        found.append([(step.loss_sum / step.count, step.grad_norm, kl) for step, kl in zip(results, points, strict=True)])
        losses.append(trainer.evaluate()["eval_loss"])
    for other in found[1:]:
        torch.testing.assert_close(torch.tensor(other), torch.tensor(found[0]), rtol=1e-4, atol=1e-5)
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)


def test_rows_of_one_class_alone(judging: dict[str, Any], write_config: Any) -> None:
    trainer = built(judging, write_config, per_device_train_batch_size=1)
    steps = [trainer.training_step(window) for window in islice(trainer.loader.windows(0), 12)]
    assert {frozenset(step.metrics) for step in steps} == {
        frozenset({"kl", "rewards/chosen", "logps/chosen"}), frozenset({"kl", "rewards/rejected", "logps/rejected"})
    }  # fmt: skip
    assert "rewards/margins" in trainer.watched(trainer.state.metrics)
    assert "rewards/margins" not in trainer.watched(dict(steps[0].metrics))


def test_a_class_is_balanced_against_the_other(judging: dict[str, Any], write_config: Any) -> None:
    write_dataset(Path(judging["dataset_dir"]), feedback(40, good=3), "feedback", columns=COLUMNS)
    values = {**judging, "val_size": 0, "eval_strategy": "no", "kto_chosen_weight": 0.5, "kto_rejected_weight": "balanced"}
    trainer = built(values, write_config)
    assert trainer.given.finetuning.kto_rejected_weight == 1.5
    window = list(trainer.loader.windows(0))
    good = sum(int(batch.desirable_P.sum()) for part in window for batch in part if batch.desirable_P is not None)
    assert good == 30
    first = trainer.training_step(window[0])
    here = int(window[0][0].desirable_P.sum()) if window[0][0].desirable_P is not None else 0
    assert first.loss_sum == pytest.approx(0.5 * (0.5 * here + 1.5 * (8 - here)), abs=1e-4)
    told = tunesmith("check", write_config({**values, "kto_chosen_weight": 1, "kto_rejected_weight": 1})).stdout
    assert "30 good and 10 bad answers" in told
    assert "count 3 times the bad ones" in told and "kto_rejected_weight: balanced" in told
    found = json.loads(tunesmith("check", write_config(values), "--json").stdout)
    assert found["plan"]["memory"]["fits"]
    assert found["plan"]["train_examples"] == 40


def test_each_prompt_is_beside_another_rows_answer(judging: dict[str, Any], write_config: Any) -> None:
    rows = built(judging, write_config).given.train_examples
    assert isinstance(rows, reference.Referenced) and isinstance(rows.rows, MismatchedFeedback)
    partners = rows.rows.partners
    assert sorted(partners) == list(range(40)) and (partners != np.arange(40)).all()
    for index in range(40):
        own, other = rows[index], rows[int(partners[index])]
        assert own.mismatched is not None and own.reference is not None
        assert own.mismatched.labels[own.mismatched.labels != -100].tolist() == other.example.labels[
            other.example.labels != -100
        ].tolist()  # fmt: skip
    ids, labels, source = np.array, np.array, Source("", "", 1, 1)
    asked = Example(ids([1, 2, 3]), labels([-100, -100, 3]), source)
    answered = Example(ids([4, 5, 6, 9]), labels([-100, 5, 6, -100]), source)
    assert crossed(asked, answered, 9).input_ids.tolist() == [1, 2, 5, 6]
    assert crossed(asked, answered, 9).labels.tolist() == [-100, -100, 5, 6]
    assert crossed(asked, answered, 3).input_ids.tolist() == [1, 2, 5]


def test_the_reference_is_computed_once(judging: dict[str, Any], write_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = built(judging, write_config)
    monkeypatch.setattr(reference, "batch_logprobs", None)
    second = built(judging, write_config, kto_chosen_weight=2.0, learning_rate=1e-4)
    assert second.given.train_examples[3].reference == first.given.train_examples[3].reference
    with pytest.raises(TypeError):  # other partners, other numbers
        built(judging, write_config, data_seed=7)


def test_an_update_is_planned(judging: dict[str, Any], write_config: Any) -> None:
    compare(judging, write_config)


def test_stopped_and_continued_is_bit_equal(judging: dict[str, Any], write_config: Any) -> None:
    def log(name: str, **changes: Any) -> list[str]:
        values = {**judging, "output_dir": f"{judging['output_dir']}-{name}", "lora_dropout": 0.1, "eval_on_start": False}
        tunesmith("train", write_config({**values, "lr_scheduler_type": "constant", **changes}))
        keys = ("current_steps", "loss", "kl", "rewards/margins")
        return [
            json.dumps([entry.get(key) for key in keys]) for entry in read_log(Path(values["output_dir"])) if "loss" in entry
        ]

    unbroken = log("unbroken")
    log("stopped", max_steps=4, save_steps=4)
    assert log("stopped", resume_from_checkpoint="auto") == unbroken


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"kto_chosen_weight": "balanced", "kto_rejected_weight": "balanced"}, "kto_rejected_weight"),
        ({"kto_chosen_weight": 0}, "kto_chosen_weight"),
        ({"pref_loss": "ipo"}, "pref_loss"),
        ({"packing": True}, "packing"),
        ({"stage": "dpo", "kto_loss": "apo_zero_unpaired"}, "kto_loss"),
        ({"val_size": 1}, "apo_zero_unpaired"),
    ],
)
def test_what_has_no_meaning_is_refused(judging: dict[str, Any], write_config: Any, changes: dict[str, Any], key: str) -> None:
    done = tunesmith("train", write_config({**judging, **changes}), check=False)
    assert done.returncode
    assert key in done.stderr

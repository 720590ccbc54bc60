"""``stage: dpo`` from pairs to a model that prefers the better answers."""

from __future__ import annotations

import json
import math
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import make_rows, tunesmith, write_dataset
from tests.e2e.test_reward_model import COLUMNS, pairs
from tunesmith.config.load import load_config
from tunesmith.config.preferences import PREFERENCE_LOSSES
from tunesmith.data.collator import collate
from tunesmith.data.kinds import Rows
from tunesmith.errors import DataError, ModelError
from tunesmith.stages import reference
from tunesmith.stages.pairs import answer_logps
from tunesmith.stages.run import build_trainer
from tunesmith.stages.scores import batch_logprobs
from tunesmith.train.progress import SilentReporter
from tunesmith.train.runlog import read_log
from tunesmith.train.trainer import PeftTrainer
from tunesmith.types import Batch


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "cache_root", lambda: tmp_path / "cache")


@pytest.fixture
def preferring(settings: dict[str, Any]) -> dict[str, Any]:
    write_dataset(Path(settings["dataset_dir"]), pairs(40), "pairs", ranking=True, columns=COLUMNS)
    return {
        **settings, "stage": "dpo", "dataset": "pairs", "val_size": 0.25, "eval_strategy": "epoch", "eval_on_start": True,
        "num_train_epochs": 4, "learning_rate": 3e-3,
    }  # fmt: skip


def built(settings: dict[str, Any], write_config: Any, **changes: Any) -> PeftTrainer:
    return build_trainer(load_config(write_config({**settings, **changes}))[0], SilentReporter())[0]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_it_begins_at_ln_2_and_comes_to_prefer(preferring: dict[str, Any], write_config: Any, kind: str) -> None:
    tunesmith("train", write_config({**preferring, "finetuning_type": kind}))
    log = read_log(Path(preferring["output_dir"]))
    before, *_, after = [entry for entry in log if "eval_loss" in entry]
    assert before["eval_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert before["eval_rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert next(entry for entry in log if "loss" in entry)["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert after["eval_loss"] < 0.67
    assert after["eval_rewards/accuracies"] >= 0.7
    assert after["eval_rewards/margins"] > 0


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_every_loss_trains(preferring: dict[str, Any], write_config: Any, name: str) -> None:
    changes = {"dpo_label_smoothing": 0.01} if name == "exo_pair" else {}
    trainer = built(preferring, write_config, pref_loss=name, **changes)
    window = next(trainer.loader.windows(0))
    trainer.model.train()
    losses = [trainer.training_step(window).loss_sum for _ in range(4)]
    assert losses[-1] < losses[0]


def test_accumulation_changes_nothing(preferring: dict[str, Any], write_config: Any) -> None:
    found = []
    for size, steps in ((8, 1), (4, 2), (1, 8)):
        trainer = built(preferring, write_config, per_device_train_batch_size=size, gradient_accumulation_steps=steps)
        results = [trainer.training_step(window) for window, _ in zip(trainer.loader.windows(0), range(3), strict=False)]
        found.append([(step.loss_sum / step.count, step.grad_norm) for step in results])
    torch.testing.assert_close(torch.tensor(found[1]), torch.tensor(found[0]), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.tensor(found[2]), torch.tensor(found[0]), rtol=1e-4, atol=1e-6)


def test_the_reference_is_the_supervised_adapter(preferring: dict[str, Any], write_config: Any) -> None:
    """Not the raw base: log-ratios are 0 at the start, and the cached numbers are those of the adapted model."""
    write_dataset(Path(preferring["dataset_dir"]), make_rows(20), "rows")
    supervised = {**preferring, "stage": "sft", "dataset": "rows", "output_dir": f"{preferring['output_dir']}-sft"}
    tunesmith("train", write_config(supervised))
    raw = built(preferring, write_config)
    for resume in (True, False):
        trainer = built(preferring, write_config, checkpoint_dir=supervised["output_dir"], resume_lora_training=resume)
        trainer.model.train()
        first = trainer.training_step(next(trainer.loader.windows(0)))
        assert first.loss_sum / first.count == pytest.approx(math.log(2), abs=1e-4)
        ours, base = (one.given.train_examples[0].reference for one in (trainer, raw))
        assert max(abs(a - b) for a, b in zip(ours, base, strict=True)) > 0.1


def test_the_reference_is_computed_once(preferring: dict[str, Any], write_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = built(preferring, write_config)
    monkeypatch.setattr(reference, "batch_logprobs", None)
    second = built(preferring, write_config, pref_loss="ipo", learning_rate=1e-4)
    assert second.given.train_examples[3].reference == first.given.train_examples[3].reference
    with pytest.raises(TypeError):  # other weights, other numbers
        built(preferring, write_config, ld_alpha=0.5)


@pytest.mark.parametrize("changed", ["seed", "peft_args", "lora_target", "rope"])
def test_another_start_is_asked_again(preferring: dict[str, Any], write_config: Any, tmp_path: Path, changed: str) -> None:
    """An adapter that begins at random, and a model whose settings were edited: the same weights, other numbers."""
    model = shutil.copytree(preferring["model_name_or_path"], tmp_path / "model")
    start = {"finetuning_type": "peft", "peft_method": "loha", "peft_args": {"r": 4, "init_weights": False}}
    values = {**preferring, **start, "model_name_or_path": str(model), "data_seed": 1}
    built(values, write_config)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    if changed == "rope":
        config["rope_parameters"]["rope_theta"] = 100.0
        (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    others = {
        "seed": {"seed": 7}, "peft_args": {"peft_args": {"r": 8, "init_weights": False}}, "lora_target": {"lora_target": "q_proj"},
    }  # fmt: skip
    trainer = built({**values, **others.get(changed, {})}, write_config)
    trainer.model.train()
    step = trainer.training_step(next(trainer.loader.windows(0)))
    assert step.loss_sum / step.count == pytest.approx(math.log(2), abs=1e-5)


def test_only_pairs_that_are_come_to_are_asked_for(preferring: dict[str, Any], write_config: Any) -> None:
    trainer = built(preferring, write_config, max_steps=2, per_device_train_batch_size=4)
    known = [pair for pair in trainer.given.train_examples.table if pair[0] == pair[0]]
    assert len(known) == 8
    seen = [batch.reference_2P for window in islice(trainer.loader.windows(0), 2) for batch in window]
    assert all(values is not None and values.isfinite().all() for values in seen)


def test_another_model_can_be_the_reference(
    preferring: dict[str, Any], write_config: Any, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"model_name_or_path": str(shared / "models/stories260K"), "template": "chatml", "resize_vocab": True}
    other = {**preferring, **changes, "ref_model": str(shared / "models/stories260K-mistral"), "pref_loss": "sigmoid"}
    same = built({**preferring, **changes}, write_config).given.train_examples[0].reference
    assert built(other, write_config).given.train_examples[0].reference == pytest.approx(same, rel=1e-4)  # the same weights
    monkeypatch.setattr(reference, "load_base_model", None)  # what is known is not asked for again
    assert built(other, write_config).given.train_examples[0].reference == pytest.approx(same, rel=1e-4)


def test_a_reference_that_cannot_be_loaded_is_named(preferring: dict[str, Any], write_config: Any, tmp_path: Path) -> None:
    """Consent to run code is given to ``model_name_or_path`` alone."""
    other = shutil.copytree(preferring["model_name_or_path"], tmp_path / "other")
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}}
    (other / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (other / "mine.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()\n", encoding="utf-8")
    for name in (tmp_path / "none", other):
        with pytest.raises(ModelError, match=f"ref_model: .*{name.name}"):
            built(preferring, write_config, ref_model=str(name), trust_remote_code=True)
    assert not (tmp_path / "ran").exists()
    done = tunesmith("check", write_config({**preferring, "ref_model": str(tmp_path / "none")}), check=False)
    assert done.returncode == 1 and "ref_model: no such folder" in done.stdout


def test_the_length_is_left_out_of_log_ratios_alone(preferring: dict[str, Any], write_config: Any) -> None:
    """The chosen answer's own loss is that of all its tokens."""
    found = []
    for alpha in (None, 0.0):
        trainer = built(preferring, write_config, pref_loss="sigmoid: 1e-9, sft: 1", ld_alpha=alpha)
        step = trainer.training_step(next(trainer.loader.windows(0)))
        found.append([step.loss_sum, step.metrics["logps/rejected"][0]])
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_a_place_that_cannot_be_written_is_named(preferring: dict[str, Any], write_config: Any, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/reference").touch()
    with pytest.raises(DataError, match=r"cannot be written: .*; free some space, or set TUNESMITH_HOME"):
        built(preferring, write_config)


def test_log_probabilities_of_answers_by_hand() -> None:
    batch = Batch(torch.zeros(5), torch.zeros(5), torch.tensor([0, 2, 3]), torch.zeros(3), (2, 3), ())
    logps = torch.tensor([-1.0, -2.0, -3.0])
    sums, tokens = answer_logps(batch, logps)
    assert (sums.tolist(), tokens.tolist()) == ([-1.0, -5.0], [1.0, 2.0])
    assert answer_logps(batch, logps, ld_alpha=0.5)[0].tolist() == [-1.0, -3.5]


def test_shared_prompts_change_nothing(preferring: dict[str, Any], write_config: Any) -> None:
    """Whole steps, references included; rows end to end, and padded."""
    found = []
    for changes in ({}, {"share_prompts": False}, {"attn_implementation": "eager"}):
        trainer = built(preferring, write_config, pref_ftx=0.5, **changes)
        results = [trainer.training_step(window) for window in islice(trainer.loader.windows(0), 3)]
        found.append([(step.loss_sum / step.count, step.grad_norm) for step in results])
        assert trainer.given.forward.share == (not changes)
    torch.testing.assert_close(torch.tensor(found[1]), torch.tensor(found[0]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.tensor(found[2]), torch.tensor(found[0]), rtol=1e-5, atol=1e-6)


def test_one_by_one_is_as_together(preferring: dict[str, Any], write_config: Any) -> None:
    trainer = built(preferring, write_config)
    rows = trainer.given.train_examples
    assert isinstance(rows, Rows)
    together = answer_logps(both := collate(rows[:4]), batch_logprobs(trainer.given, both))[0]
    for index in range(4):
        alone = answer_logps(one := collate(rows[index : index + 1]), batch_logprobs(trainer.given, one))[0]
        torch.testing.assert_close(alone, together[[index, index + 4]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"pref_loss": "sigmod"}, "pref_loss"),
        ({"pref_loss": "exo_pair"}, "dpo_label_smoothing"),
        ({"pref_loss": "sigmoid: 1, sigmoid: 2"}, "pref_loss"),
        ({"pref_loss": "orpo", "ref_model": "x"}, "ref_model"),
        ({"pref_loss": "simpo", "ld_alpha": 0.5}, "ld_alpha"),
        ({"simpo_gamma": 1.0}, "simpo_gamma"),
        ({"packing": True}, "packing"),
        ({"stage": "sft", "pref_beta": 0.5}, "pref_beta"),
        ({"stage": "sft", "pref_beta": 0.1, "share_prompts": False}, "share_prompts"),
    ],
)
def test_what_has_no_meaning_is_refused(
    preferring: dict[str, Any], write_config: Any, changes: dict[str, Any], key: str
) -> None:
    done = tunesmith("train", write_config({**preferring, **changes}), check=False)
    assert done.returncode == 2
    assert key in done.stderr


def test_stopped_and_continued_is_bit_equal(preferring: dict[str, Any], write_config: Any) -> None:
    def log(name: str, **changes: Any) -> list[str]:
        values = {**preferring, "output_dir": f"{preferring['output_dir']}-{name}", "lora_dropout": 0.1, "eval_on_start": False}
        tunesmith("train", write_config({**values, "num_train_epochs": 2, "lr_scheduler_type": "constant", **changes}))
        entries = read_log(Path(values["output_dir"]))
        return [json.dumps([e["current_steps"], e["loss"], e["rewards/margins"]]) for e in entries if "loss" in e]

    unbroken = log("unbroken", pref_ftx=0.3)
    log("stopped", pref_ftx=0.3, max_steps=3, save_steps=3)
    assert log("stopped", pref_ftx=0.3, resume_from_checkpoint="auto") == unbroken

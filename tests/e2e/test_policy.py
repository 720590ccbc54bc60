"""``stage: ppo`` and ``stage: grpo`` from prompts to a policy whose answers are worth more."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import make_rows, tunesmith, write_dataset
from tunesmith.config.load import load_config
from tunesmith.errors import CheckpointError, ModelError
from tunesmith.model.adapter import load_trainable
from tunesmith.stages.plan import heaviest_batch
from tunesmith.stages.policy import PolicyPeftTrainer
from tunesmith.stages.run import build_trainer
from tunesmith.train.progress import SilentReporter
from tunesmith.train.runlog import read_log

LETTERS = "def letters(prompts, responses):\n    return [sum(c.isascii() and c.isalpha() for c in r) / max(len(r), 1) for r in responses]\n"
"""The share of an answer that is letters: what a random model can learn in a few rollouts."""


@pytest.fixture
def answering(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    write_dataset(Path(settings["dataset_dir"]), make_rows(24))
    (tmp_path / "reward.py").write_text(LETTERS, encoding="utf-8")
    return {
        **settings, "stage": "ppo", "reward_model": f"{tmp_path / 'reward.py'}:letters", "reward_model_type": "function",
        "max_new_tokens": 16, "per_device_train_batch_size": 8, "ppo_buffer_size": 2, "ppo_epochs": 2, "num_generations": 4,
        "learning_rate": 3e-3, "lr_scheduler_type": "constant", "kl_coef": 0.02,
    }  # fmt: skip


class Notes(SilentReporter):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def built(settings: dict[str, Any], write_config: Any, **changes: Any) -> PolicyPeftTrainer:
    trainer = build_trainer(load_config(write_config({**settings, **changes}))[0], SilentReporter())[0]
    assert isinstance(trainer, PolicyPeftTrainer)
    return trainer


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_rewards_rise(answering: dict[str, Any], write_config: Any, stage: str) -> None:
    more = {"stage": stage, "ppo_epochs": 1, "learning_rate": 6e-3, "max_new_tokens": 8, "num_train_epochs": 10, "val_size": 4,
            "eval_strategy": "epoch", "eval_on_start": True}  # fmt: skip
    done = tunesmith("train", write_config({**answering, **more}))
    log = read_log(Path(answering["output_dir"]))
    rewards = [entry["reward"] for entry in log if "reward" in entry]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.1
    first = next(entry for entry in log if "loss" in entry)
    assert first["policy_kl"] == first["clip_share"] == first["kl"] == 0  # to the bit
    assert first["entropy"] > 0
    answers = [json.loads(line) for line in (Path(answering["output_dir"]) / "eval_answers.jsonl").read_text().splitlines()]
    assert len(answers) == 4 and {"prompt", "response", "reward", "ended", "row", "step"} <= answers[0].keys()
    assert "answers to the first evaluation prompts" in done.stdout


@pytest.mark.parametrize("kind", [{"finetuning_type": "full"}, {"finetuning_type": "freeze", "num_layer_trainable": 1}])
def test_without_adapters_the_reference_is_a_copy(answering: dict[str, Any], write_config: Any, kind: dict[str, Any]) -> None:
    trainer = built(answering, write_config, **kind)
    before = trainer.collect(0, 0, range(4))
    reference = [trainer.given.actors.reference(batch, 1.0) for batch in before]  # type: ignore[union-attr]
    for window, _ in zip(trainer.loader.onward(0, 0, {}), range(3), strict=False):
        trainer.training_step(window[0])
    for batch, kept in zip(before, reference, strict=True):
        assert torch.equal(trainer.given.actors.reference(batch, 1.0), kept)  # type: ignore[union-attr]


def test_an_earlier_adapter_is_the_reference(answering: dict[str, Any], write_config: Any, tmp_path: Path) -> None:
    supervised = {
        key: value for key, value in answering.items()
        if key in ("model_name_or_path", "dataset", "dataset_dir", "compute_dtype", "learning_rate", "plot_loss")
    }  # fmt: skip
    tunesmith("train", write_config({**supervised, "output_dir": str(tmp_path / "sft"), "max_steps": 4, "save_strategy": "no"}))
    for resume in (True, False):
        trainer = built(answering, write_config, checkpoint_dir=str(tmp_path / "sft"), resume_lora_training=resume)
        batches = trainer.collect(0, 0, range(4))
        assert trainer.fresh["kl"][0] == 0, resume
        reference = trainer.given.actors.reference(batches[0], 1.0)  # type: ignore[union-attr]
        trainer.training_step(batches)
        assert torch.equal(trainer.given.actors.reference(batches[0], 1.0), reference)  # type: ignore[union-attr]
        plain = built(answering, write_config)
        assert not torch.allclose(plain.given.actors.reference(batches[0], 1.0), reference, atol=1e-3)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "changes",
    [
        {"stage": "ppo", "save_steps": 3, "kl_control": "adaptive", "whiten_rewards": True},  # within a rollout
        {"stage": "grpo", "save_steps": 4, "mask_truncated": True, "importance_level": "sequence"},  # between two
    ],
)
def test_it_goes_on_as_if_it_had_not_stopped(answering: dict[str, Any], write_config: Any, changes: dict[str, Any]) -> None:
    settings = {**answering, **changes, "max_steps": 10, "val_size": 4, "eval_steps": 5, "save_strategy": "steps"}
    run = Path(answering["output_dir"])
    tunesmith("train", write_config(settings))
    whole, log = digest(run), comparable(run)
    for checkpoint in run.glob("checkpoint-*"):
        if checkpoint.name != f"checkpoint-{changes['save_steps']}":
            shutil.rmtree(checkpoint)
    tunesmith("train", write_config({**settings, "resume_from_checkpoint": "auto"}))
    assert comparable(run) == log
    assert digest(run) == whole


def test_kill_9_and_go_on(answering: dict[str, Any], write_config: Any) -> None:
    settings = {**answering, "max_steps": 12, "save_steps": 1, "save_total_limit": 2, "save_strategy": "steps"}
    run = Path(answering["output_dir"])
    tunesmith("train", write_config(settings))
    whole = digest(run)
    again = write_config({**settings, "overwrite_output_dir": True})
    process = multiprocessing.get_context("fork").Process(target=tunesmith, args=("train", again))  # it has imported all
    process.start()
    while process.is_alive() and not any(run.glob("checkpoint-[5-9]")):
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not (run / "adapter_model.safetensors").exists()
    tunesmith("train", write_config({**settings, "resume_from_checkpoint": "auto"}))
    assert digest(run) == whole


def on_a_full_disk(room: int, config: Path, told: Path) -> None:
    """Train where no file can be larger, and write what was said."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    done = tunesmith("train", config, check=False)
    told.write_text(f"{done.returncode} {done.stderr}", encoding="utf-8")


@pytest.mark.parametrize(("room", "said"), [(2000, "cannot be written"), (30_000, "run: the result cannot be written")])
def test_a_full_disk_is_told(answering: dict[str, Any], write_config: Any, tmp_path: Path, room: int, said: str) -> None:
    config = write_config({**answering, "max_steps": 1, "save_strategy": "no"})
    arguments = (room, config, tmp_path / "told")
    process = multiprocessing.get_context("fork").Process(target=on_a_full_disk, args=arguments)
    process.start()
    process.join(60)
    told = (tmp_path / "told").read_text(encoding="utf-8")
    assert told.startswith("2 ") and said in told and "File too large" in told and "make room" in told


def digest(run: Path) -> str:
    return hashlib.sha256((run / "adapter_model.safetensors").read_bytes()).hexdigest()


def comparable(run: Path) -> list[dict[str, Any]]:
    """The log without what time it took."""
    timed = ("seconds", "per_second", "_time")
    return [{key: value for key, value in entry.items() if not key.endswith(timed)} for entry in read_log(run)]


@pytest.fixture
def stopped(answering: dict[str, Any], write_config: Any) -> tuple[dict[str, Any], Path]:
    """A run with a checkpoint in the middle of a rollout, and its settings."""
    trainer = built(answering, write_config)
    windows = trainer.loader.onward(0, 0, {})
    for _ in range(3):
        trainer.training_step(next(windows)[0])
    return answering, trainer.save_checkpoint()


@pytest.mark.parametrize(
    "changed", [{"ppo_epochs": 1}, {"temperature": 0.7}, {"kl_coef": 0.1}, {"reward_functions": {"repetition": 1.0}}]
)
def test_other_settings_cannot_go_on(stopped: tuple[dict[str, Any], Path], write_config: Any, changed: dict[str, Any]) -> None:
    settings, checkpoint = stopped
    (key,) = changed
    with pytest.raises(CheckpointError, match=rf"other inputs:\n  {key}: .* then, .* now$"):
        built(settings, write_config, **changed).train(checkpoint)


def test_changed_rewards_are_told(stopped: tuple[dict[str, Any], Path], write_config: Any, tmp_path: Path) -> None:
    settings, checkpoint = stopped
    for text, told in ((LETTERS, False), (LETTERS + "# mended\n", True)):
        (tmp_path / "reward.py").write_text(text, encoding="utf-8")
        reporter = Notes()
        trainer = build_trainer(load_config(write_config({**settings, "max_steps": 3}))[0], reporter)[0]
        trainer.train(checkpoint)
        assert any("reward_model has changed since checkpoint-3" in line for line in reporter.lines) is told


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("rollout.safetensors", lambda path: path.unlink()),
        ("rollout.safetensors", lambda path: save_file(load_file(path), path, {"batches": "[{}, {}]"})),
        ("policy.json", lambda path: path.unlink()),
        ("policy.json", lambda path: path.write_text('{"kl": null, "scores": {}}')),
    ],
)
def test_a_checkpoint_that_lacks_its_rollout_is_refused(
    stopped: tuple[dict[str, Any], Path], write_config: Any, name: str, damage: Callable[[Path], None]
) -> None:
    settings, checkpoint = stopped
    damage(checkpoint / name)
    with pytest.raises(CheckpointError, match=name):
        built(settings, write_config).train(checkpoint)


def test_target_kl_leaves_a_rollout(answering: dict[str, Any], write_config: Any) -> None:
    tunesmith("train", write_config({**answering, "target_kl": 1e-6, "ppo_epochs": 4, "max_steps": 6}))
    log = [entry for entry in read_log(Path(answering["output_dir"])) if "loss" in entry]
    assert ["reward" in entry for entry in log] == [True, False] * 3  # the first update has not moved yet when it is measured


def test_an_epoch_ends_where_its_last_rollout_is_left(answering: dict[str, Any], write_config: Any) -> None:
    changes = {"target_kl": 1e-6, "ppo_epochs": 4, "val_size": 4, "eval_strategy": "epoch", "max_steps": 20}
    tunesmith("train", write_config({**answering, **changes}))  # 20 prompts, 4 in a rollout, left after two updates
    log = read_log(Path(answering["output_dir"]))
    assert [entry["current_steps"] for entry in log if "eval_reward" in entry] == [10, 20]


def test_micro_batches_change_nothing(answering: dict[str, Any], write_config: Any) -> None:
    """Rows are learned from as one by one: the same gradient, however answers are divided."""
    found = []
    for size, steps in ((16, 1), (4, 4), (1, 16)):
        trainer = built(
            answering, write_config, per_device_train_batch_size=size, gradient_accumulation_steps=steps, ppo_buffer_size=1
        )
        windows = trainer.loader.onward(0, 0, {})
        results = [trainer.training_step(next(windows)[0]) for _ in range(2)]
        found.append([(result.loss_sum / result.count, result.grad_norm) for result in results])
    torch.testing.assert_close(torch.tensor(found[1]), torch.tensor(found[0]), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.tensor(found[2]), torch.tensor(found[0]), rtol=1e-4, atol=1e-6)


def test_sharing_prompts_changes_nothing(answering: dict[str, Any], write_config: Any) -> None:
    found = []
    for share in (True, False):
        trainer = built(answering, write_config, share_prompts=share, stage="grpo")
        assert trainer.given.forward.share is share
        windows = trainer.loader.onward(0, 0, {})
        results = [trainer.training_step(next(windows)[0]) for _ in range(2)]
        found.append([(result.loss_sum / result.count, result.grad_norm) for result in results])
    torch.testing.assert_close(torch.tensor(found[1]), torch.tensor(found[0]), rtol=1e-4, atol=1e-6)


def test_a_reward_that_breaks_off_loses_nothing(answering: dict[str, Any], write_config: Any, tmp_path: Path) -> None:
    breaks = LETTERS.replace("def letters", "calls = []\ndef letters").replace(
        "    return", "    calls.append(1)\n    if len(calls) > 2: raise ValueError('no more')\n    return"
    )
    (tmp_path / "reward.py").write_text(breaks, encoding="utf-8")
    done = tunesmith("train", write_config(answering), check=False)
    assert done.returncode and "no more" in done.stderr and "reward.py" in done.stderr
    run = Path(answering["output_dir"])
    assert (run / "checkpoint-8").is_dir()
    (tmp_path / "reward.py").write_text(LETTERS, encoding="utf-8")
    tunesmith("train", write_config({**answering, "resume_from_checkpoint": "auto"}))
    assert (run / "adapter_model.safetensors").is_file()


def test_starting_anew_leaves_nothing_of_a_run_that_broke_off(
    answering: dict[str, Any], write_config: Any, tmp_path: Path
) -> None:
    run, known = Path(answering["output_dir"]), (tmp_path / "reward.py").read_text(encoding="utf-8")
    (tmp_path / "reward.py").write_text(known.replace("return", "assert len(prompts) < 16; return"), encoding="utf-8")
    evaluated = {**answering, "val_size": 4, "eval_strategy": "epoch", "eval_on_start": True}
    assert tunesmith("train", write_config(evaluated), check=False).returncode
    assert (run / "eval_answers.jsonl").is_file()
    (run / "rollout_adapter").mkdir()
    (tmp_path / "reward.py").write_text(known, encoding="utf-8")
    tunesmith("train", write_config({**answering, "overwrite_output_dir": True, "max_steps": 1}))
    assert not (run / "eval_answers.jsonl").exists() and not (run / "rollout_adapter").exists()


def test_a_signal_gives_up_a_rollout_and_nothing_is_lost(answering: dict[str, Any], write_config: Any, tmp_path: Path) -> None:
    """It comes in the second rollout, while answers are judged; this one is collected again, as if it had never been begun."""
    terminates = LETTERS.replace("def letters", "import os, pathlib, signal\ncalls = []\ndef letters").replace(
        "    return",
        "    calls.append(1)\n    once = pathlib.Path(__file__).with_name('once')\n"
        "    if len(calls) == 2 and not once.exists():\n        once.touch()\n        os.kill(os.getpid(), signal.SIGTERM)\n    return",
    )
    (tmp_path / "reward.py").write_text(terminates, encoding="utf-8")
    settings, run = {**answering, "max_steps": 8, "kl_control": "adaptive"}, Path(answering["output_dir"])
    done = tunesmith("train", write_config(settings), check=False)
    assert done.returncode == 128 + signal.SIGTERM and "stopped at step 4 of 8" in done.stderr
    tunesmith("train", write_config({**settings, "resume_from_checkpoint": "auto"}))
    broken = digest(run)
    tunesmith("train", write_config({**settings, "overwrite_output_dir": True}))
    assert digest(run) == broken


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_rewards_that_would_drown_all_others_are_refused(
    answering: dict[str, Any], write_config: Any, tmp_path: Path, stage: str
) -> None:
    huge = "def letters(prompts, responses):\n    return [3e38] * len(responses)\n"
    (tmp_path / "reward.py").write_text(huge, encoding="utf-8")
    trainer = built(answering, write_config, stage=stage)
    with pytest.raises(ModelError, match=r"rows.jsonl:1 \(row 1\) comes to 3e\+38, whose square is too large"):
        trainer.collect(0, 0, range(4))
    assert built(answering, write_config, stage=stage, reward_clip=5).collect(0, 0, range(4))


def test_a_limit_beyond_the_model_plans_no_longer_rows(answering: dict[str, Any], write_config: Any) -> None:
    config = load_config(write_config({**answering, "max_new_tokens": 100_000}))[0]
    trainer = built(answering, write_config)
    assert max(heaviest_batch(config, trainer.given.train_examples).lengths) == 512


def test_drawn_limits_hold_in_evaluation_too(answering: dict[str, Any], write_config: Any) -> None:
    limits = {"response_lengths": [2, 5], "max_new_tokens": None, "val_size": 6, "eval_strategy": "epoch"}
    trainer = built(answering, write_config, **limits)
    trainer.given.run.mkdir(parents=True)
    assert 2 <= trainer.evaluate()["eval_response_length"] <= 5
    lengths = [batch.num_targets / len(batch.lengths) for batch in trainer.collect(0, 0, range(4))]
    assert 2 <= min(lengths) <= max(lengths) <= 5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reward_model": "{tmp}/reward.py:nothing"}, "the file has no function 'nothing'"),
        ({"reward_functions": {"{tmp}/reward.py:nothing": 1.0}}, "the file has no function 'nothing'"),
        ({"reward_model": "{tmp}/nowhere", "reward_model_type": "lora"}, "no such folder"),
        ({"reward_functions": {"math_answer": 1.0}, "dataset": "questions"}, "2 of 2 prompts have no answer to compare with"),
    ],
)
def test_check_looks_at_rewards(
    answering: dict[str, Any], write_config: Any, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    """What a run, or a later stage of a pipeline, would stumble over is found before anything is trained."""
    write_dataset(Path(answering["dataset_dir"]), [{"instruction": "the cat"}, {"instruction": "a mat"}], "questions")
    settings = json.loads(json.dumps({**answering, **changes}).replace("{tmp}", str(tmp_path)))
    errors = json.loads(tunesmith("check", write_config(settings), "--json", check=False).stdout)["errors"]
    assert len(errors) == 1 and errors[0]["code"] == "reward" and said in errors[0]["message"]


def test_the_value_head_stays_in_checkpoints(answering: dict[str, Any], write_config: Any) -> None:
    tunesmith("train", write_config({**answering, "max_steps": 4, "save_steps": 3, "save_strategy": "steps"}))
    run = Path(answering["output_dir"])
    assert (run / "checkpoint-3" / "value_head.safetensors").is_file()
    assert not (run / "value_head.safetensors").is_file()  # what is left is a model to talk to
    trainer = built(answering, write_config)
    load_trainable(trainer.model, run / "checkpoint-3")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reward_model": None, "reward_model_type": "lora"}, "nothing says what an answer is worth"),
        ({"stage": "grpo", "num_generations": 1}, "a group of one"),
        ({"num_generations": 3}, "not a multiple"),
        ({"do_sample": False}, "learns from sampled answers"),
        ({"num_beams": 2}, "not from a search"),
        ({"lora_dropout": 0.1}, "another one in each pass"),
        ({"grpo_loss": "grpo"}, "only with stage: grpo"),
        ({"stage": "grpo", "gamma": 0.9}, "only with stage: ppo"),
        ({"kl_control": "adaptive", "kl_coef": 0}, "adaptive starts from kl_coef"),
        ({"ref_model": "m", "kl_coef": 0}, "ref_model: has no meaning with kl_coef: 0"),
        ({"kl_estimator": "k2", "kl_coef": 0}, "kl_estimator: has no meaning with kl_coef: 0"),
        ({"group_by_length": True}, "is sorted by itself"),
        ({"packing": True}, "reads prompts"),
        ({"rollout_engine": "api"}, "give both"),
        ({"response_lengths": [8, 4]}, "[least, most]"),
        ({"cutoff_len": 600, "max_new_tokens": None, "max_length": 4}, "leaves no room"),
        ({"metric_for_best_model": "eval_loss"}, "eval_reward"),
    ],
)
def test_what_does_not_go_together(answering: dict[str, Any], write_config: Any, changes: dict[str, Any], said: str) -> None:
    done = tunesmith("train", write_config({**answering, **changes}), check=False)
    assert done.returncode
    assert said in done.stderr

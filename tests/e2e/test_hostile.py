"""What a hostile or unlucky user does."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tests.conftest import make_tokenizer, tunesmith, write_dataset
from tunesmith.model.tokenizer import repair_pad_token
from tunesmith.train.runlog import read_log


def test_k1_killed_at_any_moment_a_run_ends_bit_equal(settings: dict[str, Any], write_config: Any) -> None:
    settings.update(num_train_epochs=8, save_steps=1, lora_dropout=0.1, save_total_limit=2)
    config = write_config(settings)
    unbroken = Path(settings["output_dir"])
    broken = unbroken.parent / "broken"
    tunesmith("train", config)
    command = ("train", config, f"output_dir={broken}", "resume_from_checkpoint=auto")
    moments = random.Random(0)
    for _ in range(3):
        process = multiprocessing.get_context("fork").Process(target=tunesmith, args=command)  # it has imported all
        process.start()
        before = len(read_log(broken))
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.is_alive() and len(read_log(broken)) < before + 3:
            time.sleep(0.01)
        time.sleep(moments.random() * 0.2)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    tunesmith(*command)
    one, two = (load_file(run / "adapter_model.safetensors") for run in (unbroken, broken))
    assert all((one[key] == two[key]).all() for key in one)
    assert [e["loss"] for e in read_log(unbroken)] == [e["loss"] for e in read_log(broken)]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
def test_k5_a_full_disk_ends_the_run_and_spares_what_is_there(
    settings: dict[str, Any], write_config: Any, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(small)], check=False, capture_output=True
    ).returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        settings.update(output_dir=str(small / "run"), save_steps=1, max_steps=20)
        done = tunesmith("train", write_config(settings), check=False)
        assert done.returncode == 2
        assert "cannot be written" in done.stderr
        assert "Traceback" not in done.stderr
        checkpoints = sorted((small / "run").glob("checkpoint-*"))
        assert checkpoints
        for folder in checkpoints[:-1]:
            shutil.rmtree(folder)
        done = tunesmith(
            "train", write_config(settings), "resume_from_checkpoint=auto", "save_total_limit=1", "save_steps=10", check=False
        )
        assert f"resuming from {checkpoints[-1]}" in done.stdout
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_pad_token_is_distinct_where_one_exists(tmp_path: Path) -> None:
    make_tokenizer(tmp_path, pad_is_eos=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    repair_pad_token(tokenizer)
    assert tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.eos_token == "<|im_end|>"


@pytest.mark.parametrize(
    "changes",
    [
        {"compute_dtype": "fp16"},
        {"fp16": True, "finetuning_type": "full", "learning_rate": 1e-3, "compute_dtype": "auto"},
        {"use_dora": True},
        {"use_rslora": True},
        {"lora_target": "q_proj,v_proj"},
        {"optim": "adafactor", "learning_rate": 1e-3},
        {"lr_scheduler_type": "warmup_stable_decay", "warmup_ratio": 0.1},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-3}},
        {"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 2},
    ],
    ids=lambda c: next(iter(c.values())) if isinstance(c, dict) else None,
)
def test_settings_train(settings: dict[str, Any], write_config: Any, changes: dict[str, Any]) -> None:
    settings.update(num_train_epochs=4, **changes)
    tunesmith("train", write_config(settings))
    entries = read_log(Path(settings["output_dir"]))
    assert sum(e["loss"] for e in entries[-4:]) < sum(e["loss"] for e in entries[:4])
    assert all(e["grad_norm"] is not None for e in entries)


def test_changed_settings_are_refused_on_resume(settings: dict[str, Any], write_config: Any) -> None:
    config = write_config(settings)
    tunesmith("train", config, "max_steps=2", "save_steps=1")
    changed = ("learning_rate=1e-3", "lora_alpha=99", "weight_decay=0.5", "optim=sgd", "seed=7")
    done = tunesmith("train", config, "max_steps=4", "resume_from_checkpoint=auto", *changed, check=False)
    assert done.returncode == 2
    for key in (
        "learning_rate: 0.01 then, 0.001 now",
        "lora_alpha: None then, 99.0 now",
        "weight_decay",
        "optim",
        "seed: 42 then, 7 now",
    ):
        assert key in done.stderr


def test_resuming_wins_over_overwriting_in_the_file(settings: dict[str, Any], write_config: Any) -> None:
    config = write_config({**settings, "overwrite_output_dir": True})
    tunesmith("train", config, "max_steps=2", "save_steps=1")
    done = tunesmith("train", config, "max_steps=3", "resume_from_checkpoint=auto")
    assert "set aside" in done.stdout
    assert [e["current_steps"] for e in read_log(Path(settings["output_dir"]))] == [1, 2, 3]
    assert "overwrite_output_dir" not in (Path(settings["output_dir"]) / "config.yaml").read_text()


def test_going_back_behind_later_checkpoints_is_refused(settings: dict[str, Any], write_config: Any) -> None:
    config = write_config(settings)
    run = Path(settings["output_dir"])
    tunesmith("train", config, "max_steps=3", "save_steps=1")
    done = tunesmith("train", config, "max_steps=4", f"resume_from_checkpoint={run}/checkpoint-1", check=False)
    assert done.returncode == 2
    assert "checkpoint-2, checkpoint-3" in done.stderr


def test_overwriting_destroys_nothing_before_all_is_checked(settings: dict[str, Any], write_config: Any) -> None:
    config = write_config(settings)
    run = Path(settings["output_dir"])
    tunesmith("train", config, "max_steps=1")
    files = sorted(p.name for p in run.iterdir())
    assert tunesmith("train", config, "overwrite_output_dir=true", "dataset=rowz", check=False).returncode == 2
    assert sorted(p.name for p in run.iterdir()) == files


def test_a_folder_with_somebodys_files_is_not_overwritten(settings: dict[str, Any], write_config: Any) -> None:
    run = Path(settings["output_dir"])
    run.mkdir()
    (run / "config.yaml").write_text("mine: 1")
    done = tunesmith("train", write_config(settings), "overwrite_output_dir=true", check=False)
    assert done.returncode == 2
    assert "was not made by a run" in done.stderr
    assert (run / "config.yaml").read_text() == "mine: 1"


def test_a_refused_run_leaves_no_folder(settings: dict[str, Any], write_config: Any) -> None:
    assert tunesmith("train", write_config(settings), "dataset=rowz", check=False).returncode == 2
    assert not Path(settings["output_dir"]).exists()


def test_a_lost_best_checkpoint_keeps_the_last_weights(settings: dict[str, Any], write_config: Any) -> None:
    # the more is learned of these rows, the worse the other ones are predicted
    write_dataset(Path(settings["dataset_dir"]), [{"instruction": "the", "output": "世界很高兴" * 20}] * 4, "other")
    settings.update(eval_dataset="other", eval_steps=1, save_steps=1, load_best_model_at_end=True, learning_rate=3e-2)
    config = write_config(settings)
    tunesmith("train", config, "max_steps=4")
    run = Path(settings["output_dir"])
    best = json.loads((run / "train_results.json").read_text())["best_step"]
    assert best < 4
    shutil.rmtree(run / f"checkpoint-{best}")
    done = tunesmith("train", config, "max_steps=4", "resume_from_checkpoint=auto")
    assert "the last weights are kept" in done.stdout


def test_several_processes_are_refused(settings: dict[str, Any], write_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process" in tunesmith("train", write_config(settings), check=False).stderr

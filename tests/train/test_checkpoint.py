from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import ROOT
from tunesmith.config.arguments import FinetuningArguments, TrainingArguments
from tunesmith.errors import CheckpointError
from tunesmith.train.checkpoint import (
    MANIFEST,
    TrainerState,
    checkpoint_path,
    list_checkpoints,
    load_state,
    newest_sound,
    prune,
    save_state,
    verify,
    write_atomically,
)
from tunesmith.train.optimizer import build_optimizer, build_schedule


def make(run: Path, step: int) -> Path:
    folder = checkpoint_path(run, step)

    def fill(scratch: Path) -> None:
        (scratch / "weights").write_bytes(bytes(range(256)) * step)
        (scratch / "text.json").write_text("{}")

    write_atomically(folder, fill)
    return folder


def test_what_is_written_verifies_and_leaves_nothing_else(tmp_path: Path) -> None:
    folder = make(tmp_path, 3)
    verify(folder)
    assert sorted(p.name for p in folder.iterdir()) == [MANIFEST, "text.json", "weights"]
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"]
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["files"]["weights"]["bytes"] == 768


@pytest.mark.parametrize("damage", ["delete", "empty", "half", "short", "flip"])
@pytest.mark.parametrize("name", ["weights", "text.json", MANIFEST])
def test_k2_damage_is_seen_and_the_older_one_used(tmp_path: Path, damage: str, name: str) -> None:
    older, newest = make(tmp_path, 1), make(tmp_path, 2)
    path = newest / name
    data = path.read_bytes()
    cut = {"empty": 0, "half": len(data) // 2, "short": len(data) - 2}
    if damage == "delete":
        path.unlink()
    elif damage == "flip":
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    else:
        path.write_bytes(data[: cut[damage]])
    with pytest.raises(CheckpointError, match="checkpoint-2"):
        verify(newest)
    said: list[str] = []
    assert newest_sound(tmp_path, said.append) == older
    if path.exists() or name != MANIFEST:  # without a manifest the folder is not one of ours
        assert len(said) == 1
        assert "checkpoint-2" in said[0]


def test_a_failing_write_leaves_the_earlier_checkpoint_and_no_debris(tmp_path: Path) -> None:
    make(tmp_path, 1)

    def fill(scratch: Path) -> None:
        (scratch / "weights").write_bytes(b"x")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left on device"):
        write_atomically(checkpoint_path(tmp_path, 2), fill)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


def test_debris_of_a_killed_write_is_no_checkpoint_and_no_obstacle(tmp_path: Path) -> None:
    make(tmp_path, 1)
    partial = tmp_path / ".checkpoint-2.partial"
    partial.mkdir()
    (partial / "weights").write_bytes(b"x")
    assert newest_sound(tmp_path, print) == checkpoint_path(tmp_path, 1)
    verify(make(tmp_path, 2))
    assert not partial.exists()


def test_k6_pruning_spares_best_last_and_what_is_not_ours(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        make(tmp_path, step)
    own = tmp_path / "checkpoint-mine-3"
    own.mkdir()
    bare = tmp_path / "checkpoint-7"
    bare.mkdir()
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    shutil.copytree(checkpoint_path(tmp_path, 5), outside)
    (tmp_path / "checkpoint-3").symlink_to(outside)
    for step in (20, 5, 10):
        os.utime(checkpoint_path(tmp_path, step))
    assert [p.name for p in prune(tmp_path, 2, keep={5, 20})] == ["checkpoint-10", "checkpoint-15"]
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-5", "checkpoint-20"]
    assert prune(tmp_path, 1, keep={5, 20}) == []
    assert own.is_dir()
    assert bare.is_dir()
    assert (outside / "weights").is_file()


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "adafactor"])
def test_state_comes_back_bit_equal(tmp_path: Path, optim: str) -> None:
    args = TrainingArguments(
        output_dir="x", optim=optim, learning_rate=0.1, lr_scheduler_type="cosine", warmup_steps=1, weight_decay=0.1
    )

    def build() -> tuple[dict[str, torch.nn.Parameter], torch.optim.Optimizer, Any]:
        torch.manual_seed(0)
        parameters = {"w": torch.nn.Parameter(torch.randn(4, 3)), "b": torch.nn.Parameter(torch.randn(3))}
        optimizer = build_optimizer(args, FinetuningArguments(), torch.nn.Module(), parameters)
        return parameters, optimizer, build_schedule(args, optimizer, 10)

    def advance(
        parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, schedule: Any, steps: int
    ) -> list[float]:
        rates = []
        for _ in range(steps):
            for p in parameters.values():
                p.grad = torch.randn_like(p) + random.random() + float(np.random.rand())
            optimizer.step()
            schedule.step()
            rates.append(optimizer.param_groups[0]["lr"])
        return rates

    parameters, optimizer, schedule = build()
    advance(parameters, optimizer, schedule, 4)
    weights = {name: p.detach().clone() for name, p in parameters.items()}
    state = TrainerState(step=4, epoch=1, window=2, total_steps=10, best_metric=0.1 + 0.2, inputs={"a": 1})
    save_state(tmp_path, state, optimizer, schedule, None)
    groups = optimizer.state_dict()["param_groups"]
    rates = advance(parameters, optimizer, schedule, 5)

    again, optimizer, schedule = build()
    with torch.no_grad():
        for name, p in again.items():
            p.copy_(weights[name])
    assert load_state(tmp_path, optimizer, schedule, None) == state
    assert [group | {"lr": 0} for group in optimizer.state_dict()["param_groups"]] == [group | {"lr": 0} for group in groups]
    assert advance(again, optimizer, schedule, 5) == rates
    assert all(torch.equal(parameters[name], again[name]) for name in parameters)


def test_state_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir="x")
    model, w = torch.nn.Module(), torch.nn.Parameter(torch.randn(2, 2))
    one = build_optimizer(args, FinetuningArguments(), model, {"w": w})
    save_state(tmp_path, TrainerState(), one, build_schedule(args, one, 3), None)
    two = build_optimizer(args, FinetuningArguments(), model, {"w": w, "b": torch.nn.Parameter(torch.randn(2))})
    with pytest.raises(CheckpointError, match="does not fit"):
        load_state(tmp_path, two, build_schedule(args, two, 3), None)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace, which is not installed")
def test_files_are_flushed_before_the_rename_and_the_parent_after(tmp_path: Path) -> None:
    script = "import sys; from pathlib import Path; from tests.train.test_checkpoint import make; make(Path(sys.argv[1]), 2)"
    trace = tmp_path / "trace"
    subprocess.run(
        ["strace", "-f", "-y", "-e", "trace=fsync,rename", "-o", str(trace), sys.executable, "-c", script, str(tmp_path)],
        check=True, cwd=ROOT,
    )  # fmt: skip
    calls = [line for line in trace.read_text().splitlines() if "checkpoint-2" in line or str(tmp_path) + ">" in line]
    rename = next(i for i, line in enumerate(calls) if "rename(" in line)
    flushed = [line for line in calls[:rename] if "fsync(" in line]
    assert {name for name in ("weights", "text.json", MANIFEST) if any(f"/{name}>" in line for line in flushed)} == {
        "weights",
        "text.json",
        MANIFEST,
    }
    assert f"/{MANIFEST}>" in flushed[-2]
    assert ".checkpoint-2.partial>" in flushed[-1]
    assert any("fsync(" in line and f"{tmp_path}>" in line for line in calls[rename:])

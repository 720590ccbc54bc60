"""Checkpoints that are complete or invisible.

A checkpoint is written into a temporary folder, every file is flushed to disk, a manifest with the SHA-256 of each
comes last, and only then is the folder renamed into place and its parent flushed. Safetensors and JSON only.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tunesmith.data.source import file_sha
from tunesmith.errors import CheckpointError

MANIFEST = "checkpoint.json"
STATE = "trainer_state.json"
OPTIMIZER = "optimizer.safetensors"
_FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass
class TrainerState:
    """Where the loop stands.

    Attributes:
        step: updates done.
        epoch: the epoch of the next window.
        window: windows of that epoch already done.
        data: what else the loader needs to go on there (see its ``place``).
        total_steps: planned updates.
        best_metric: the best evaluation so far, by ``metric_for_best_model``.
        best_step: the step at which it was seen.
        loss_sum, loss_count: losses since the last log line.
        metrics: name -> (sum, count) of what the stage measures besides, since then.
        elapsed: seconds of training, earlier runs included.
        inputs: what must not change between a run and its continuation: key -> value.
    """

    step: int = 0
    epoch: int = 0
    window: int = 0
    data: dict[str, Any] = field(default_factory=dict)
    total_steps: int = 0
    best_metric: float | None = None
    best_step: int | None = None
    loss_sum: float = 0.0
    loss_count: float = 0.0
    metrics: dict[str, tuple[float, int]] = field(default_factory=dict)
    elapsed: float = 0.0
    inputs: dict[str, Any] = field(default_factory=dict)


def checkpoint_path(run: Path, step: int) -> Path:
    """Folder of a step's checkpoint."""
    return run / f"checkpoint-{step}"


def write_atomically(target: Path, fill: Callable[[Path], None]) -> None:
    """Let ``fill`` write files into a temporary folder, then put the folder at ``target``.

    Raises:
        CheckpointError: the disk is full or not writable; nothing is left behind and earlier checkpoints stay whole.
    """
    scratch = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        fill(scratch)
        files = sorted(p for p in scratch.rglob("*") if p.is_file())
        for path in files:
            flush(path)
        manifest = {
            "format": _FORMAT,
            "made_by": "tunesmith",
            "files": {str(p.relative_to(scratch)): {"bytes": p.stat().st_size, "sha256": file_sha(p)} for p in files},
        }
        write_json(scratch / MANIFEST, manifest)
        flush(scratch / MANIFEST)
        flush(scratch)
        if target.exists():
            shutil.rmtree(target)
        scratch.rename(target)
        flush(target.parent)
    except OSError as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise CheckpointError(f"{target}: cannot be written: {error.strerror or error}") from error
    except BaseException as error:
        shutil.rmtree(scratch, ignore_errors=True)
        if type(error).__module__.startswith("safetensors"):  # its I/O errors are not OSError
            raise CheckpointError(f"{target}: cannot be written: {error}") from error
        raise


def flush(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write JSON; numbers keep every digit."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def verify(folder: Path) -> None:
    """Raise CheckpointError unless every file of the checkpoint is there with its hash."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"].items()
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise CheckpointError(f"{folder}: no readable {MANIFEST}: not a complete checkpoint") from None
    for name, facts in files:
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing")
        if path.stat().st_size != facts["bytes"]:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes, expected {facts['bytes']}")
        if file_sha(path) != facts["sha256"]:
            raise CheckpointError(f"{path}: damaged, its SHA-256 is not the recorded one")


def step_of(folder: Path) -> int:
    """Step of a checkpoint folder."""
    match = _NAME.fullmatch(folder.name)
    return int(match.group(1)) if match else 0


def list_checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders that a run made, oldest step first. Links, and folders without a manifest, are not ours."""
    found = []
    for path in run.glob("checkpoint-*") if run.is_dir() else ():
        if _NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink() and (path / MANIFEST).is_file():
            found.append((step_of(path), path))
    return [path for _, path in sorted(found)]


def newest_sound(run: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies; ``say`` gets a line for each that does not."""
    for folder in reversed(list_checkpoints(run)):
        try:
            verify(folder)
            return folder
        except CheckpointError as error:
            say(f"skipping a damaged checkpoint: {error}")
    return None


def prune(run: Path, limit: int | None, keep: set[int]) -> list[Path]:
    """Delete the oldest checkpoints beyond ``limit``, but never the steps in ``keep``. Returns what was deleted."""
    if limit is None:
        return []
    checkpoints = list_checkpoints(run)
    deleted: list[Path] = []
    for folder in checkpoints:
        if len(checkpoints) - len(deleted) <= limit:
            break
        if step_of(folder) not in keep:
            shutil.rmtree(folder)
            deleted.append(folder)
    return deleted


def save_state(
    folder: Path,
    state: TrainerState,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
    scaler: torch.amp.GradScaler | None,
) -> None:
    """Write everything but the weights: position, optimizer, schedule, loss scale, random generators."""
    tensors, scalars = _split_optimizer(optimizer.state_dict())
    tensors["rng.torch"] = torch.get_rng_state()
    for index, generator in enumerate(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else ()):
        tensors[f"rng.cuda.{index}"] = generator
    save_file(tensors, folder / OPTIMIZER)
    schedule_state = {k: v for k, v in schedule.state_dict().items() if k != "lr_lambdas"}
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    write_json(
        folder / STATE,
        {
            "state": asdict(state),
            "optimizer": scalars,
            "schedule": schedule_state,
            "scaler": scaler.state_dict() if scaler else None,
            "rng": {
                "python": [version, list(internal), gauss],
                "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
            },
        },
    )


def load_state(
    folder: Path,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
    scaler: torch.amp.GradScaler | None,
) -> TrainerState:
    """Put back what ``save_state`` wrote. Raises CheckpointError when it does not fit the optimizer."""
    saved = read_state(folder)
    tensors = load_file(folder / OPTIMIZER)
    try:
        optimizer.load_state_dict(_join_optimizer(tensors, saved["optimizer"]))
    except (ValueError, KeyError) as error:
        raise CheckpointError(
            f"{folder}: its optimizer state does not fit: {error}; was optim or finetuning_type changed?"
        ) from None
    schedule.load_state_dict({**schedule.state_dict(), **saved["schedule"]})
    if scaler and saved["scaler"]:
        scaler.load_state_dict(saved["scaler"])
    version, internal, gauss = saved["rng"]["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = saved["rng"]["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["rng.torch"])
    if torch.cuda.is_available():
        states = [tensors[f"rng.cuda.{i}"] for i in range(torch.cuda.device_count()) if f"rng.cuda.{i}" in tensors]
        if len(states) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(states)
    return TrainerState(**saved["state"])


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint. Raises CheckpointError when there is none."""
    return read_json(folder / STATE)


def read_json(path: Path) -> dict[str, Any]:
    """What ``write_json`` wrote into a checkpoint. Raises CheckpointError when it cannot be read."""
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return value
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None


def _split_optimizer(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Optimizer state -> tensors under ``state.<parameter>.<name>``, names of nested mappings joined, and JSON-able rest."""
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    taken: set[int] = set()
    for index, values in state["state"].items():
        if rest := _take_tensors(values, f"state.{index}", tensors, taken):
            scalars[str(index)] = rest
    return tensors, {"scalars": scalars, "param_groups": state["param_groups"]}


def _take_tensors(values: dict[str, Any], path: str, tensors: dict[str, torch.Tensor], taken: set[int]) -> dict[str, Any]:
    """Put the tensors of a nested mapping into ``tensors``, one that several parameters share as copies.

    Returns what is left of the mapping. ``taken`` has the addresses of the tensors so far.
    """
    rest: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            if inner := _take_tensors(value, f"{path}.{name}", tensors, taken):
                rest[name] = inner
        elif isinstance(value, torch.Tensor):
            tensor = value.detach().to("cpu").contiguous()
            tensors[f"{path}.{name}"] = tensor.clone() if tensor.data_ptr() in taken else tensor
            taken.add(tensor.data_ptr())
        else:
            rest[name] = value
    return rest


def _join_optimizer(tensors: dict[str, torch.Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {int(index): values for index, values in rest["scalars"].items()}
    for key, tensor in tensors.items():
        kind, _, path = key.partition(".")
        if kind != "state":
            continue
        index, *outer, name = path.split(".")
        place = state.setdefault(int(index), {})
        for part in outer:
            place = place.setdefault(part, {})
        place[name] = tensor
    groups = [
        {k: tuple(v) if isinstance(v, list) and k != "params" else v for k, v in group.items()}
        for group in rest["param_groups"]
    ]
    return {"state": state, "param_groups": groups}

"""The run folder: who may write into it, what is written about the run itself, where a continuation starts."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tunesmith.config.arguments import TrainingArguments
from tunesmith.errors import CheckpointError, ConfigError
from tunesmith.train.checkpoint import list_checkpoints, newest_sound, step_of, verify, write_json
from tunesmith.train.runfiles import (
    ANSWERS,
    CONFIG,
    DATA_REPORT,
    FINETUNING_ARGS,
    LOSS_PLOT,
    MANIFEST,
    RESULTS,
    ROLLOUT_ADAPTER,
    SAMPLES,
    is_finished,
    read_results,
)
from tunesmith.train.runlog import LOG_NAME

_OWN_FILES = (CONFIG, MANIFEST, RESULTS, SAMPLES, DATA_REPORT, FINETUNING_ARGS, LOSS_PLOT, LOG_NAME, ANSWERS)


def claim(args: TrainingArguments) -> Path:
    """Check that the run may write into ``output_dir``; nothing is changed yet.

    Raises:
        CheckpointError: the folder holds another run; the message gives the ways out.
        ConfigError: the folder cannot be used.
    """
    run = Path(args.output_dir)
    if run.exists() and not run.is_dir():
        raise ConfigError(f"output_dir: {run} is a file; give a folder")
    existing = next((path for path in (run, *run.absolute().parents) if path.exists()), run)
    if not os.access(existing, os.W_OK):
        raise ConfigError(f"output_dir: {existing} is not writable")
    strangers = [name for name in _OWN_FILES if (run / name).is_file()]
    if strangers and not _is_ours(run):
        raise ConfigError(
            f"output_dir: {run / strangers[0]} was not made by a run and would be overwritten; give another folder"
        )
    if not args.resume_from_checkpoint and not args.overwrite_output_dir and (made := _made_by_a_run(run)):
        state = "a finished run" if is_finished(run) else f"an earlier run ({made})"
        proceed = "num_train_epochs or max_steps raised and " if is_finished(run) else ""
        raise CheckpointError(
            f"output_dir: {run} holds {state}. Either\n"
            f"  give another output_dir, or\n"
            f"  go on from it: {proceed}resume_from_checkpoint=auto, or\n"
            f"  start anew in it: overwrite_output_dir=true (removes only what the run made)"
        )
    return run


def open_run(run: Path, overwrite: bool) -> None:
    """Create the run folder, or empty it of an earlier run. Called when everything else has been checked.

    Raises:
        ConfigError: the folder cannot be created.
    """
    if overwrite:
        clear(run)
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir: {run} cannot be created: {error.strerror}") from None


def _is_ours(run: Path) -> bool:
    """Whether the folder's manifest says that a run of ours wrote it."""
    try:
        return bool(json.loads((run / MANIFEST).read_text(encoding="utf-8")).get("made_by") == "tunesmith")
    except (OSError, ValueError, AttributeError):
        return False


def _made_by_a_run(run: Path) -> str:
    if list_checkpoints(run):
        return f"{list_checkpoints(run)[-1].name} and earlier"
    return next((name for name in _OWN_FILES if (run / name).is_file()), "")


def files_in(run: Path) -> set[str]:
    """Names of the files at the root of a run folder."""
    return {path.name for path in run.iterdir() if path.is_file()}


def write_results(run: Path, existing: set[str], results: dict[str, Any]) -> None:
    """Mark the run as finished. ``existing`` are the files that were there before it; all newer ones are its own."""
    earlier = read_results(run).get("files", []) if is_finished(run) else []
    made = sorted(files_in(run) - existing | set(earlier) | {RESULTS})
    write_json(run / RESULTS, {**results, "files": made})


def clear(run: Path) -> None:
    """Remove what a run made in this folder; anything else stays."""
    names = list(_OWN_FILES) if _is_ours(run) else []
    if names:
        shutil.rmtree(run / ROLLOUT_ADAPTER, ignore_errors=True)
    if is_finished(run):
        names += [name for name in read_results(run)["files"] if Path(name).name == name]
    for name in names:
        (run / name).unlink(missing_ok=True)
    for folder in list_checkpoints(run):
        shutil.rmtree(folder)
    for folder in run.glob(".checkpoint-*.partial"):
        shutil.rmtree(folder)


def starting_point(args: TrainingArguments, run: Path, say: Callable[[str], None]) -> Path | None:
    """The checkpoint to continue from, or None to start from the beginning.

    Raises:
        CheckpointError: an explicitly named checkpoint is damaged or missing.
    """
    asked = args.resume_from_checkpoint
    if not asked:
        return None
    if asked is True or asked in ("auto", "true"):
        found = newest_sound(run, say)
        say(f"resuming from {found}" if found else f"nothing to resume in {run}: starting from the beginning")
        return found
    folder = Path(asked)
    verify(folder)
    later = [path for path in list_checkpoints(run) if step_of(path) > step_of(folder)]
    if later and folder.resolve().parent == run.resolve():
        raise CheckpointError(
            f"{folder}: the run went on from here ({', '.join(path.name for path in later)}); remove those folders to go back, "
            "or give another output_dir"
        )
    say(f"resuming from {folder}")
    return folder


def write_manifest(run: Path, model_path: str, facts: dict[str, Any]) -> None:
    """Write ``manifest.json``: versions, threads, hashes of the base weights, and ``facts`` (data hashes, seeds)."""
    packages = ("torch", "transformers", "peft", "tokenizers", "safetensors", "numpy")
    write_json(
        run / MANIFEST,
        {
            "made_by": "tunesmith",
            **facts,
            "base_model": {"path": model_path, "files": _weight_hashes(Path(model_path))},
            "versions": {"python": platform.python_version(), **{name: version(name) for name in ("tunesmith", *packages)}},
            "machine": {"platform": platform.platform(), "threads": torch.get_num_threads()},
        },
    )


def _weight_hashes(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and hash of each weight file; of large files the first and last MiB are hashed, and it is said."""
    hashes: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        size = path.stat().st_size
        with path.open("rb") as file:
            if size <= 1 << 30:
                hashes[path.name] = {"bytes": size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
                continue
            digest = hashlib.sha256(file.read(1 << 20))
            file.seek(-(1 << 20), os.SEEK_END)
            digest.update(file.read())
            hashes[path.name] = {"bytes": size, "sha256_of_first_and_last_mib": digest.hexdigest()}
    return hashes

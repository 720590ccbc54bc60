"""Which kernels norms and gated layers of a run are computed by: our own, the same compiled, or Liger's."""

from __future__ import annotations

import time
from typing import Any

import torch

from tunesmith.config.arguments import RunConfig
from tunesmith.data.kinds import Rows
from tunesmith.data.loader import make_loader, planned_updates
from tunesmith.data.prepare import data_seed
from tunesmith.data.selection import Examples
from tunesmith.data.streaming import ExampleStream
from tunesmith.errors import ConfigError, ModelError
from tunesmith.model.adapter import count_parameters
from tunesmith.model.compiled import compile_now, compiled, has_compiler
from tunesmith.model.forward import FlatForward
from tunesmith.model.fuse import Fused, fuse, unfuse
from tunesmith.model.liger import liger, liger_version
from tunesmith.train.progress import Reporter

LONG = 1e15
"""Planned operations (4 for each parameter and token) from which ``compile: auto`` compiles on a CPU. Compiling takes 11
seconds of one core, and saves 3 % of a step: it is won back in 6 minutes, or 1e14 operations of SmolLM2 on that core
(docs/LOG.md). This is ten times as much, for faster machines and smaller savings."""


def fuse_layers(
    config: RunConfig,
    rows: Examples | Rows[Any] | ExampleStream,
    forward: FlatForward,
    dtype: torch.dtype,
    device: torch.device,
    reporter: Reporter,
) -> None:
    """Let the norms and gated layers of a model run fused, as the configuration says.

    Raises:
        ConfigError: Liger's kernels were asked for, and cannot be had.
        ModelError: compiled ones were asked for, and the compiler does not work.
    """
    training, model = config.training, forward.model
    if _takes_liger(config, device):
        fused = fuse(model, liger())
        reporter.note(f"model: {_counted(fused)} run by the kernels of Liger {liger_version()} in place of the library's code")
    elif training.compile is True or (training.compile == "auto" and _is_long(config, rows, model, device)):
        _compile(config, forward, dtype, reporter)
    else:
        fuse(model)


def _takes_liger(config: RunConfig, device: torch.device) -> bool:
    asked = config.training.use_liger_kernel
    if asked is True and device.type != "cuda":
        raise ConfigError(
            f"use_liger_kernel: true: Liger's kernels run on NVIDIA GPUs, and this run is on {device}; set it to auto"
        )
    if asked is True and liger_version() is None:
        raise ConfigError(
            "use_liger_kernel: true: liger-kernel is not installed; pip install 'tunesmith[gpu]', or set it to auto"
        )
    return asked is True or (
        asked == "auto" and device.type == "cuda" and config.training.compile is not True and liger_version() is not None
    )


def _compile(config: RunConfig, forward: FlatForward, dtype: torch.dtype, reporter: Reporter) -> None:
    began = time.perf_counter()
    try:
        fused = fuse(forward.model, compiled())
        compile_now(forward, dtype)
    except ModelError as error:
        if config.training.compile is True:
            raise
        unfuse(forward.model)
        fuse(forward.model)
        reporter.note(f"note: {error}")
        return
    reporter.note(f"model: {_counted(fused)} compiled in {time.perf_counter() - began:.1f} s")


def _counted(fused: Fused) -> str:
    return f"{fused.norms} norms and {fused.gates} gated layers"


def _is_long(
    config: RunConfig, rows: Examples | Rows[Any] | ExampleStream, model: torch.nn.Module, device: torch.device
) -> bool:
    """Whether compiling is won back for sure on a CPU; a matter of the run alone, so that a continued one decides as before."""
    if device.type != "cpu" or not has_compiler():
        return False
    return 4.0 * count_parameters(model)[1] * _planned_tokens(config, rows) >= LONG


def _planned_tokens(config: RunConfig, rows: Examples | Rows[Any] | ExampleStream) -> float:
    """Tokens of the whole run; rows of a stream, which are not known, count as half of the longest there may be."""
    data, training = config.data, config.training
    capacity = data.cutoff_len if data.packing else None
    loader = make_loader(rows, training, data_seed(config), not data.disable_shuffling, capacity)
    units = planned_updates(loader, training) * training.per_device_train_batch_size * training.gradient_accumulation_steps
    if capacity is not None:
        return float(units * capacity)
    return units * (data.cutoff_len / 2 if isinstance(rows, ExampleStream) else float(rows.lengths.mean()))

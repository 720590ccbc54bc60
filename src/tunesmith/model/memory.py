"""Memory of this machine: how much there is, what this process has, what allocators add; and what to say when it fails."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from tunesmith.errors import OutOfMemoryError
from tunesmith.process import allocator_of_training
from tunesmith.types import Batch

GIB = 2**30
_CGROUPS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
_ADDED = {"mimalloc": 0.10, "system": 0.45, "cuda": 0.1}
"""Share of the tensors' bytes that lies between blocks, by allocator. Measured on the CPU (docs/performance.md)."""
_CODE = 110 * 2**20
"""Bytes of kernels, made for the shapes that come, and what they work in."""


def allocator_slack(tensors: int, device: torch.device) -> int:
    """Bytes that tensors of so many bytes take beyond their own."""
    return round(tensors * _ADDED[allocator_of_training() if device.type == "cpu" else "cuda"]) + _CODE


def available_memory(device: torch.device) -> int | None:
    """Bytes that this process can still take on ``device``; None where it cannot be told.

    On the CPU, what the system calls available, or what the limit of the control group leaves, if that is less.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu" or sys.platform != "linux":
        return None
    found = [_field(Path("/proc/meminfo"), "MemAvailable")]
    for limit, usage in _CGROUPS:
        try:
            most, used = (Path("/sys/fs/cgroup", name).read_text(encoding="ascii").strip() for name in (limit, usage))
        except OSError:
            continue
        if most.isdigit():
            found.append(max(int(most) - int(used) + _reclaimable(Path("/sys/fs/cgroup", usage).parent), 0))
    return min(found)


def _reclaimable(group: Path) -> int:
    """Bytes of files in memory that a control group counts as used and would give up at once."""
    try:
        lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.split()[:1] in (["inactive_file"], ["total_inactive_file"]))


def resident_memory() -> int:
    """Bytes of this process in memory; 0 where it cannot be told."""
    return _field(Path("/proc/self/status"), "VmRSS") if sys.platform == "linux" else 0


def _field(file: Path, name: str) -> int:
    line = next(line for line in file.read_text(encoding="ascii").splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and ("can't allocate memory" in str(error) or "out of memory" in str(error))


@contextmanager
def out_of_memory_explained(what: str, window: Sequence[Batch]) -> Iterator[None]:
    """Turn a failed allocation into an error that says what was run and what to change.

    Args:
        what: was being done.
        window: its micro-batches.

    Raises:
        OutOfMemoryError: in place of the library's error.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        largest = max(window, key=lambda batch: batch.num_tokens)
        said = str(error).strip().splitlines()[:1]
        sizes = f"{len(largest.lengths)} rows, {largest.num_tokens:,} tokens, the longest row {max(largest.lengths):,}"
        raise OutOfMemoryError(
            f"out of memory: {what} ({sizes}; rows: {', '.join(map(str, largest.sources[:3]))}). Less is needed with "
            "gradient_checkpointing: true, a smaller per_device_train_batch_size (and a larger gradient_accumulation_steps), a "
            "smaller cutoff_len, or quantization_bit: 4 with finetuning_type: lora; tunesmith check says how much each saves. "
            f"Checkpoints written so far are whole. The system said: {said[0][:200] if said else type(error).__name__}"
        ) from error

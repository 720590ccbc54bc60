"""Memory of this machine: how much there is, how much this process has, and how what is freed is given back."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch

_MMAP_THRESHOLD = -3
"""``M_MMAP_THRESHOLD`` of glibc's mallopt."""
_GIVEN_BACK = 256 * 1024
_CGROUPS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))


def give_back_freed() -> None:
    """Have glibc take blocks of 256 KiB and more from the system one by one, and give each back when it is freed.

    By default the size from which it does so rises to 32 MiB as soon as blocks of that size are freed; activations then
    come from a heap that grows full of holes. On Linux with glibc only; elsewhere, or where MALLOC_MMAP_THRESHOLD_ is set,
    nothing is changed.
    """
    if sys.platform == "linux" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        set_option = getattr(ctypes.CDLL(None), "mallopt", None)
        if set_option is not None:
            set_option(_MMAP_THRESHOLD, _GIVEN_BACK)


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be taken on ``device``; None where it cannot be told.

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
            found.append(max(int(most) - int(used), 0))
    return min(found)


def resident_memory() -> int:
    """Bytes of this process in memory; 0 where it cannot be told."""
    return _field(Path("/proc/self/status"), "VmRSS") if sys.platform == "linux" else 0


def _field(file: Path, name: str) -> int:
    line = next(line for line in file.read_text(encoding="ascii").splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024

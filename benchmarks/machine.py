"""What a figure was measured on, and how fast that multiplies matrices."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers


def facts(threads: int) -> dict[str, Any]:
    """Date, processor, threads, versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    models = {line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")}
    flags = next((line for line in lines if line.startswith("flags")), "")
    return {
        "date": date.today().isoformat(),
        "processor": ", ".join(sorted(models)) or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "bf16": [name for name in ("amx_bf16", "avx512_bf16") if f" {name}" in flags],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def gemm_rate(threads: int, dtype: torch.dtype = torch.bfloat16, size: int = 2048) -> float:
    """Operations a second of a square matrix product: the best of seven, which is what the machine can do."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
        times = []
        for _ in range(9):
            began = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - began)
        return 2 * size**3 / min(times[2:])
    finally:
        torch.set_num_threads(before)


def highest_memory(process: int | str = "self") -> float:
    """Highest resident memory of a process so far, MiB."""
    return _memory(process, "VmHWM")


def own_memory() -> float:
    """Resident memory of this process that is no page of a file, MiB."""
    return _memory("self", "RssAnon")


def _memory(process: int | str, field: str) -> float:
    status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1]) / 1024


def last_line(command: Sequence[str]) -> Any:
    """The JSON on the last line that a command prints."""
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def median(values: list[float]) -> float:
    """Of none, not a number."""
    return statistics.median(values) if values else float("nan")

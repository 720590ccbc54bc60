"""What a process that trains is started with: an allocator that keeps its pages, and kernel caches that end somewhere.

A step frees and takes the same few gigabytes of activations again and again. glibc either gives freed blocks back to the
system, which has to clear every page anew, or keeps them in a heap that fills with holes; mimalloc does neither. And oneDNN
keeps the kernels of the last 1,024 shapes twice over: with a new number of tokens in every batch, memory grows by some 20 MiB
an update for that (docs/performance.md has the figures).
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

CHOICE = "TUNESMITH_ALLOCATOR"
"""Environment variable: ``system`` leaves the allocator as it is, ``mimalloc`` is as if it were not set."""
_STARTED = "started"
"""What it is for the process that is started again, and no other."""
_PACKAGE, _LIBRARY = "cmeel-mimalloc", "cmeel.prefix/lib/libmimalloc.so"
_SETTINGS = {"MIMALLOC_PURGE_DELAY": "-1"}
"""What is freed stays with the process."""
_KERNEL_CACHES = {"LRU_CACHE_CAPACITY": "64", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
"""Shapes whose kernels are kept, by torch and by oneDNN itself: more than an update of one batch has."""
_CHOSEN_BY_USER = ("LD_PRELOAD", "GLIBC_TUNABLES", "MALLOC_", "MIMALLOC_")
_GPU = Path("/dev/nvidiactl")


def environment(env: MutableMapping[str, str]) -> dict[str, str] | None:
    """The environment in which this program should be started again; None where it should go on as it is.

    It goes on unless this is Linux without an NVIDIA device (there, the tensors of a step are not in this memory), mimalloc is
    installed, and the user has set nothing about allocators.
    """
    chosen = env.get(CHOICE, "mimalloc") != "mimalloc" or any(name.startswith(_CHOSEN_BY_USER) for name in env)
    if sys.platform != "linux" or _GPU.exists() or chosen:
        return None
    try:
        library = Path(str(distribution(_PACKAGE).locate_file(_LIBRARY)))
    except PackageNotFoundError:
        return None
    if not library.is_file():
        return None
    return {**env, **_SETTINGS, "LD_PRELOAD": str(library), CHOICE: _STARTED}


def prepare(arguments: Sequence[str]) -> None:
    """Bound the kernel caches, unless the user has, and start this process again, by the same command line, with mimalloc.

    Comes back where that is done or should not be. To be called before torch is imported.

    Args:
        arguments: of the process, as ``sys.orig_argv``.
    """
    for name, capacity in _KERNEL_CACHES.items():
        os.environ.setdefault(name, capacity)
    if os.environ.get(CHOICE) == _STARTED:
        for name in (CHOICE, "LD_PRELOAD", *_SETTINGS):  # of no concern to the processes that this one starts
            os.environ.pop(name, None)
        return
    env = environment(os.environ)
    if env is not None:
        os.execve(sys.executable, list(arguments), env)


def allocator_of_training() -> str:
    """``mimalloc`` if it serves this process, or would serve one that trains, started in this environment; else ``system``."""
    return "mimalloc" if environment(os.environ) is not None or _has_mimalloc() else "system"


def described() -> str:
    """For the log: the allocator and the bounds that hold in this process, by whomever they are set; empty without any."""
    parts = []
    if _has_mimalloc():
        parts.append(f"memory by mimalloc ({CHOICE}=system leaves it to the system)")
    if shapes := os.environ.get("LRU_CACHE_CAPACITY"):
        parts.append(f"kernels of {shapes} shapes kept (LRU_CACHE_CAPACITY)")
    return ", ".join(parts)


def _has_mimalloc() -> bool:
    return sys.platform == "linux" and "libmimalloc" in Path("/proc/self/maps").read_text(encoding="utf-8")

"""A verb in a process of its own: its memory is freed when it ends, signals reach it, and its exit status is kept."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from tunesmith.errors import CheckpointError

_PASSED = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_LOCK = ".pipeline.lock"


def start(arguments: Sequence[str], keep: Sequence[int] = ()) -> int:
    """Run ``tunesmith`` with these arguments and wait for it.

    The process has a session of its own, so that Ctrl-C in a terminal reaches it once, from here, as any signal does.

    Args:
        arguments: of the command line.
        keep: file descriptors that it holds open while it lives.

    Returns:
        Its exit status; 128 + n where signal n ended it, as shells say it.
    """
    return wait([sys.executable, "-m", "tunesmith", *arguments], keep)


def wait(command: Sequence[str], keep: Sequence[int] = ()) -> int:
    """Run any command so."""
    process: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        if process is None:
            early.append(number)
        elif process.poll() is None:
            process.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in _PASSED}
    try:
        process = subprocess.Popen(command, start_new_session=True, pass_fds=tuple(keep))
        for number in early:
            process.send_signal(number)
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[tuple[int, ...]]:
    """Hold a pipeline's folder; yields the descriptors that a stage must keep open, so that it holds it, too.

    A stage that outlives a pipeline that was killed still writes; a second one then must not go on with it.

    Raises:
        CheckpointError: another pipeline, or a stage of one, holds the folder.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        yield ()
        return
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError(
                f"{folder}: another pipeline is at work here, or a stage that went on when its pipeline was killed; wait for "
                "it, or end it, and start again"
            ) from None
        yield (descriptor,)
    finally:
        os.close(descriptor)

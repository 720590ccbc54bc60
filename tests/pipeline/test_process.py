"""A process of its own: exit statuses, signals, and the lock that a stage holds as long as it lives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tunesmith.errors import CheckpointError
from tunesmith.pipeline.process import locked, wait


def test_exit_statuses_are_kept_as_shells_say_them() -> None:
    assert wait([sys.executable, "-c", "raise SystemExit(143)"]) == 143
    assert wait([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]) == 137


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_handed_on_once_and_ends_nothing_here(tmp_path: Path, number: int) -> None:
    ready, count = tmp_path / "ready", tmp_path / "count"
    script = (
        "import pathlib, signal, sys, time\n"
        f"def note(n, frame): pathlib.Path({str(count)!r}).open('a').write(f'{{n}} ')\n"
        f"signal.signal({int(number)}, note)\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        "end = time.monotonic() + 20\n"
        f"while time.monotonic() < end and not pathlib.Path({str(count)!r}).exists(): time.sleep(0.01)\n"
        "time.sleep(0.1)\n"
        "sys.exit(7)\n"
    )

    def send() -> None:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    before = signal.getsignal(number)
    assert wait([sys.executable, "-c", script]) == 7
    sender.join()
    assert count.read_text() == f"{int(number)} "
    assert signal.getsignal(number) is before


def test_a_stage_that_outlives_its_pipeline_still_holds_the_folder(tmp_path: Path) -> None:
    with locked(tmp_path) as held:
        stage = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=held)
        with pytest.raises(CheckpointError, match="another pipeline is at work here"), locked(tmp_path):
            pass
    with pytest.raises(CheckpointError, match="a stage that went on"), locked(tmp_path):
        pass
    stage.communicate(b"\n")
    with locked(tmp_path):
        pass


def test_the_pipeline_itself_stays_light() -> None:
    script = "import sys, tunesmith.pipeline.run; print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

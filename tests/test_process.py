"""mimalloc is used where it helps, unless the user has chosen."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tunesmith import process

SCRIPT = """
import os, sys
from tunesmith.process import allocator_of_training, described, prepare
prepare(sys.orig_argv)
print(described())
print(allocator_of_training(), "libmimalloc" in open("/proc/self/maps").read(), [*filter(os.environ.get, ("LD_PRELOAD", "TUNESMITH_ALLOCATOR"))], sys.argv[1:])
"""


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(process, "_GPU", tmp_path / "none")


@pytest.mark.parametrize(
    "env", [{"LD_PRELOAD": "x"}, {"MALLOC_ARENA_MAX": "1"}, {"MIMALLOC_VERBOSE": "1"}, {"TUNESMITH_ALLOCATOR": "system"}]
)
def test_what_the_user_has_set_stays(env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert process.environment(env) is None
    monkeypatch.setattr(os, "environ", before := {**env, "TUNESMITH_ALLOCATOR": env.get("TUNESMITH_ALLOCATOR", "mimalloc")})
    process.prepare([])
    assert env.items() <= before.items()


@pytest.mark.skipif(sys.platform != "linux" or find_spec("cmeel_pth") is None, reason="needs Linux and cmeel-mimalloc")
def test_the_process_is_started_again_by_the_same_command_line() -> None:
    assert process.environment({}) is not None
    command = [sys.executable, "-c", SCRIPT, "a", "b c"]
    env = {name: value for name, value in os.environ.items() if name != "LRU_CACHE_CAPACITY"}
    for shapes, given in (
        ("64", env),
        ("7", {**env, "LRU_CACHE_CAPACITY": "7"}),
        ("64", {**env, "TUNESMITH_ALLOCATOR": "mimalloc"}),
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=given)
        said, found = done.stdout.splitlines()
        assert found == "mimalloc True [] ['a', 'b c']"
        assert said.startswith("memory by mimalloc") and f"kernels of {shapes} shapes kept" in said


def test_nothing_is_said_where_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LRU_CACHE_CAPACITY", raising=False)
    monkeypatch.setattr(process, "_has_mimalloc", lambda: False)
    assert process.described() == ""


def test_a_gpu_leaves_it_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(process, "_GPU", tmp_path)
    assert process.environment({}) is None

"""Which kernels a run takes: compiled ones train as the others do, long runs take them, Liger's run on GPUs alone."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from tests.conftest import tunesmith
from tests.model.test_lora_kernel import assert_equal, loss_and_gradients, prepared
from tunesmith.config.load import load_config
from tunesmith.errors import ConfigError, ModelError
from tunesmith.model import liger as liger_module
from tunesmith.model.compiled import FOLDER, compiled
from tunesmith.model.fuse import fuse, unfuse
from tunesmith.model.fused import EAGER, Activation, Norm
from tunesmith.stages import kernels
from tunesmith.stages.run import build_trainer
from tunesmith.train.progress import SilentReporter


class Notes(SilentReporter):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of torch's compiler
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_compiled_kernels_train_as_the_librarys_layers_do(
    settings: dict[str, Any], write_config: Any, monkeypatch: pytest.MonkeyPatch, dtype: str, tmp_path: Any
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    trainer = prepared(load_config(write_config({**settings, "compile": True, "compute_dtype": dtype}))[0])
    assert any((tmp_path / "compiled").rglob("*.so"))
    mine = loss_and_gradients(trainer)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    batches = [window[0] for window in trainer.loader.windows(0)]
    assert len({batch.num_tokens for batch in batches}) > 2
    for batch in batches:
        trainer.compute_loss(batch).sum.backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before == 4  # of any length, of all layers
    trainer.model.zero_grad()
    unfuse(trainer.model)
    assert_equal(mine, loss_and_gradients(trainer), 1e-5 if dtype == "fp32" else 5e-2)


@pytest.mark.filterwarnings("default")  # of torch's compiler
def test_models_of_one_process_are_compiled_one_after_the_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    made = compiled()
    formulas = [Norm(eps, offset, late) for eps in (1e-5, 1e-6) for offset in (0.0, 1.0) for late in (False, True)]
    for how, dtype, rows in itertools.product(formulas, (torch.float32, torch.bfloat16), (1, 3)):
        x, weight = torch.randn(rows, 8, dtype=dtype), torch.randn(8)
        torch.testing.assert_close(made.norm(x, weight, how), EAGER.norm(x, weight, how))


@pytest.mark.parametrize(("compile", "compiles"), [("auto", True), (False, False)])
def test_a_long_run_compiles(
    settings: dict[str, Any], write_config: Any, monkeypatch: pytest.MonkeyPatch, compile: Any, compiles: bool
) -> None:
    """Planned: 5 updates of 4 rows."""
    called: list[bool] = []
    monkeypatch.setattr(kernels, "compiled", lambda: EAGER)
    monkeypatch.setattr(kernels, "compile_now", lambda *_: called.append(True))
    monkeypatch.setattr(kernels, "has_compiler", lambda: True)
    config, _ = load_config(write_config({**settings, "compile": compile, "max_steps": 5}))
    trainer, _ = build_trainer(config, SilentReporter())
    parameters = sum(p.numel() for p in trainer.model.parameters())
    needed = 4 * parameters * 20 * float(trainer.given.train_examples.lengths.mean())
    for limit, long in ((needed * 1.01, False), (needed * 0.99, True)):
        monkeypatch.setattr(kernels, "LONG", limit)
        called.clear()
        reporter = Notes()
        build_trainer(config, reporter)
        assert called == [True] * (long and compiles)
        assert any("compiled in" in said for said in reporter.said) == (long and compiles)


def test_a_compiler_that_fails_ends_a_run_that_asked_for_it(
    settings: dict[str, Any], write_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ModelError("compile: torch's compiler failed: no header; set compile: false")

    monkeypatch.setattr(kernels, "compile_now", fail)
    monkeypatch.setattr(kernels, "has_compiler", lambda: True)
    monkeypatch.setattr(kernels, "LONG", 0)
    done = tunesmith("train", write_config({**settings, "compile": True}), check=False)
    assert done.returncode and "compile: torch's compiler failed: no header" in done.stderr
    reporter = Notes()
    trainer = build_trainer(load_config(write_config(settings))[0], reporter)[0]
    assert any(said.startswith("note: compile: torch's compiler failed") for said in reporter.said)
    loss_and_gradients(trainer)  # eager


def test_compiled_code_is_kept_where_the_guide_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Torch sets a folder of its own as soon as its compiler is imported, which is no choice of the user."""
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path))
    for before, after in ((default_cache_dir(), str(tmp_path / "compiled")), (mine := str(tmp_path / "mine"), mine)):
        monkeypatch.setenv(FOLDER, before)
        compiled()
        assert os.environ[FOLDER] == after


def test_a_folder_that_cannot_be_written_to_ends_no_run_that_did_not_ask(
    settings: dict[str, Any], write_config: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(FOLDER, str(tmp_path / "file" / "folder"))
    monkeypatch.setattr(kernels, "has_compiler", lambda: True)
    monkeypatch.setattr(kernels, "LONG", 0)
    reporter = Notes()
    loss_and_gradients(build_trainer(load_config(write_config(settings))[0], reporter)[0])
    reason = f"compile: no folder for compiled code can be made at {tmp_path / 'file/folder'} (Not a directory)"
    assert any(said.startswith(f"note: {reason}") for said in reporter.said), reporter.said
    with pytest.raises(ModelError, match=re.escape(reason)):
        build_trainer(load_config(write_config({**settings, "compile": True}))[0], reporter)


def stand_in(called: list[Any]) -> dict[str, ModuleType]:
    """Liger's functions with their names and arguments (version 0.8.5), computed by ours."""

    def norm(x: Any, weight: Any, eps: float, offset: float, casting_mode: str, in_place: bool) -> torch.Tensor:
        called.append(("norm", offset, casting_mode, in_place))
        return EAGER.norm(x, weight, Norm(eps, offset, casting_mode == "gemma"))

    def product(activation: Activation) -> Any:
        def apply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            called.append(activation)
            return EAGER.gated(a, b, activation)

        return SimpleNamespace(apply=apply)

    names = {
        "rms_norm": {"LigerRMSNormFunction": SimpleNamespace(apply=norm)},
        "swiglu": {"LigerSiLUMulFunction": product("silu")},
        "geglu": {"LigerGELUMulFunction": product("gelu_tanh")},
    }
    made = {"liger_kernel": ModuleType("liger_kernel"), "liger_kernel.ops": ModuleType("liger_kernel.ops")}
    for name, members in names.items():
        module = made[f"liger_kernel.ops.{name}"] = ModuleType(name)
        vars(module).update(members)
    return made


def test_liger_computes_norms_and_gates(settings: dict[str, Any], write_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    for name, module in stand_in(called).items():
        monkeypatch.setitem(sys.modules, name, module)
    trainer = prepared(load_config(write_config(settings))[0])
    mine = loss_and_gradients(trainer)
    unfuse(trainer.model)
    fuse(trainer.model, liger_module.liger())
    assert_equal(loss_and_gradients(trainer), mine, tolerance=0)
    assert called.count(("norm", 0.0, "llama", False)) == 5 and called.count("silu") == 2 and len(called) == 7


def test_liger_is_taken_on_gpus_alone(settings: dict[str, Any], write_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def takes(device: str, installed: str | None, **changes: Any) -> bool:
        monkeypatch.setattr(kernels, "liger_version", lambda: installed)
        return kernels._takes_liger(load_config(write_config({**settings, **changes}))[0], torch.device(device))

    assert takes("cuda", "0.8") and not takes("cuda", None) and not takes("cpu", "0.8")
    assert not takes("cuda", "0.8", use_liger_kernel=False) and not takes("cuda", "0.8", compile=True)
    with pytest.raises(ConfigError, match=r"run on NVIDIA GPUs, and this run is on cpu"):
        takes("cpu", "0.8", use_liger_kernel=True)
    with pytest.raises(ConfigError, match=r"pip install 'tunesmith\[gpu\]'"):
        takes("cuda", None, use_liger_kernel=True)
    with pytest.raises(ConfigError, match="compile: true replaces the same layers"):
        takes("cuda", "0.8", use_liger_kernel=True, compile=True)

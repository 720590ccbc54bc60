"""The arithmetic of fused functions as torch's compiler makes it: one pass over the memory for each.

What is compiled are the functions of ``model/fused.py``: what a decoder layer does between its matrix products and its
attention, which are calls of libraries and would stay as they are. So one compilation serves all layers, whatever the number
of tokens, and nothing of a batch (its row boundaries) or of an adapter is looked at by the compiler.

Compiled code is kept in the cache between runs. The compiler's own store of graphs is not used, because it holds pickles; it
would save one second of four.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from tunesmith.config.paths import cache_root
from tunesmith.errors import ModelError
from tunesmith.model.adapter import trainable_parameters, unwrap
from tunesmith.model.forward import FlatForward, probe_batch
from tunesmith.model.fused import PLAIN, Bodies, Body, Kernels, kernels
from tunesmith.model.precision import autocast

FOLDER = "TORCHINDUCTOR_CACHE_DIR"
"""Environment variable: where compiled code is kept."""
_VARIANTS = 64
"""Of a function, that may be compiled in one process: dtypes, formulas, one token or several. The compiler's own bound of 8 is
for models whose shapes it does not follow, and ends a run."""


def has_compiler() -> bool:
    """Whether there is a C++ compiler, which kernels for a CPU need: ``$CXX``, else ``g++`` or ``clang++``."""
    return any(shutil.which(name) for name in ([os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]))


def compiled() -> Kernels:
    """Kernels that are compiled when they are called first.

    Raises:
        ModelError: there can be no folder for compiled code.
    """
    import torch._dynamo.config as dynamo
    import torch._functorch.config as autograd
    import torch._inductor.config as inductor
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    if os.environ.get(FOLDER) in (None, default_cache_dir()):  # which torch sets itself, as soon as peft has imported it
        os.environ[FOLDER] = str(cache_root() / "compiled")
    try:
        Path(os.environ[FOLDER]).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(
            f"compile: no folder for compiled code can be made at {os.environ[FOLDER]} ({error.strerror}); "
            f"set {FOLDER} to one that can, or compile: false"
        ) from error
    autograd.enable_autograd_cache = False
    inductor.fx_graph_cache = False
    dynamo.recompile_limit = max(dynamo.recompile_limit, _VARIANTS)
    inductor.compile_threads = 1  # four small functions, one after the other
    return kernels(Bodies(*(_compiled(getattr(PLAIN, field.name)) for field in dataclasses.fields(PLAIN))))


def _compiled(body: Body) -> Body:
    """One compilation, for tensors that require gradients or do not, and are views or are not."""
    inner = torch.compile(body, dynamic=True, fullgraph=True)

    def run(*values: Any) -> Any:
        return inner(*(value.detach() if isinstance(value, torch.Tensor) else value for value in values))

    return run


def compile_now(forward: FlatForward, dtype: torch.dtype) -> None:
    """Run a few tokens through the model, forwards and backwards, so that what it needs is compiled; it comes back as it was.

    Args:
        forward: of the model as it is trained.
        dtype: that training computes in.

    Raises:
        ModelError: the compiler does not work.
    """
    device, training = unwrap(forward.model).device, forward.model.training
    batch = probe_batch(unwrap(forward.model))
    forward.model.eval()
    try:
        with autocast(device, dtype):
            total = forward.logits(batch).float().sum()
        torch.autograd.grad(total, [*trainable_parameters(forward.model).values()], allow_unused=True)
    except RuntimeError as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(f"compile: torch's compiler failed: {reason}; set compile: false") from error
    finally:
        forward.model.train(training)

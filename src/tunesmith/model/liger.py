"""Norms and gated activations by Liger's Triton kernels (arXiv 2410.10989), on NVIDIA GPUs; the package is the extra ``gpu``.

Only functions are taken from it: no class of a model is exchanged, and its fused loss is not used, since losses here never
hold all logits (``losses/token_logprobs.py``).
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from tunesmith.model.fused import EAGER, Activation, Kernels, Norm


def liger_version() -> str | None:
    """Version of the installed package; None if there is none."""
    try:
        return version("liger-kernel")
    except PackageNotFoundError:
        return None


def liger() -> Kernels:
    """Liger's kernels; what it has none for is computed by our own functions."""
    from liger_kernel.ops.geglu import LigerGELUMulFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    products: dict[Activation, Any] = {"silu": LigerSiLUMulFunction, "gelu_tanh": LigerGELUMulFunction}

    def norm(x: torch.Tensor, weight_H: torch.Tensor, how: Norm) -> torch.Tensor:
        if x.dtype != weight_H.dtype:  # it would give the input's dtype, and not the wider one
            return EAGER.norm(x, weight_H, how)
        mode = "gemma" if how.late else "llama"
        y: torch.Tensor = LigerRMSNormFunction.apply(x, weight_H, how.eps, how.offset, mode, False)
        return y

    def gated(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
        if activation not in products:
            return EAGER.gated(gate, up, activation)
        y: torch.Tensor = products[activation].apply(gate, up)
        return y

    def gated_halves(both: torch.Tensor, activation: Activation) -> torch.Tensor:
        gate, up = both.chunk(2, dim=-1)
        return gated(gate, up, activation)

    return Kernels(norm, gated, gated_halves)

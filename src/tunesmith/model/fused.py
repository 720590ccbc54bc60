"""Normalisation and gated activation of a decoder layer as one autograd function each, which keep their inputs alone.

The library's RMS norm keeps a float32 copy of its input for the backward pass, and its gated activation keeps the activated
gate beside gate and up. Here the first keeps its input, as it is, and one number for each row; the second keeps gate and up,
and activates again. Arithmetic inside is float32 (float64 for float64), rounded where the library rounds in the forward pass.

``N`` rows, ``H`` width of the model, ``K`` width of the gate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import gelu, silu

Activation = Literal["silu", "gelu", "gelu_tanh"]
Body = Callable[..., Any]


@dataclass(frozen=True)
class Norm:
    """What an RMS norm computes.

    Attributes:
        eps: added to the mean of squares.
        offset: added to the weight (Gemma: 1).
        late: whether the result is rounded to the input's dtype after the product with the weight, and not before.
    """

    eps: float
    offset: float
    late: bool


@dataclass(frozen=True)
class Bodies:
    """The arithmetic of both functions, as it is or compiled; all without gradients."""

    norm: Body
    norm_back: Body
    gate: Body
    gate_back: Body


def norm_body(x_NH: torch.Tensor, weight_H: torch.Tensor, how: Norm) -> tuple[torch.Tensor, torch.Tensor]:
    """``w x / sqrt(mean(x^2) + eps)`` (arXiv 1910.07467, eq. 4), ``[N, H]``, and the inverse root, ``[N, 1]``."""
    exact_NH = x_NH.to(_accurate(x_NH))
    inverse_N1 = exact_NH.square().mean(-1, keepdim=True).add_(how.eps).rsqrt_()
    unit_NH = exact_NH * inverse_N1
    if how.late:
        return (unit_NH * _shifted(weight_H, how, unit_NH.dtype)).to(x_NH.dtype), inverse_N1
    return unit_NH.to(x_NH.dtype) * _shifted(weight_H, how, weight_H.dtype), inverse_N1


def norm_back_body(
    grad_NH: torch.Tensor, x_NH: torch.Tensor, weight_H: torch.Tensor, inverse_N1: torch.Tensor, how: Norm, trained: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """With ``u = x r`` and ``g = w dy``: ``dx = r (g - u mean(g u))``, and ``dw = sum(dy u)`` if it is ``trained``."""
    unit_NH = x_NH.to(inverse_N1.dtype) * inverse_N1
    grad_NH = grad_NH.to(inverse_N1.dtype)
    grad_H = (grad_NH * unit_NH).sum(0).to(weight_H.dtype) if trained else None
    scaled_NH = grad_NH * _shifted(weight_H, how, grad_NH.dtype)
    share_N1 = (scaled_NH * unit_NH).mean(-1, keepdim=True)
    return scaled_NH.addcmul_(unit_NH, share_N1, value=-1).mul_(inverse_N1).to(x_NH.dtype), grad_H


def gate_body(gate_NK: torch.Tensor, up_NK: torch.Tensor, activation: Activation) -> torch.Tensor:
    """``act(gate) up`` (arXiv 2002.05202, section 2)."""
    return _activated(gate_NK, activation).mul_(up_NK)


def gate_back_body(
    grad_NK: torch.Tensor, gate_NK: torch.Tensor, up_NK: torch.Tensor, activation: Activation
) -> tuple[torch.Tensor, torch.Tensor]:
    """``dgate = act'(gate) up dy`` and ``dup = act(gate) dy``."""
    inner_NK = grad_NK * up_NK
    if activation == "silu":
        inner_NK = torch.ops.aten.silu_backward(inner_NK, gate_NK)
    else:
        inner_NK = torch.ops.aten.gelu_backward(inner_NK, gate_NK, approximate=_APPROXIMATE[activation])
    return inner_NK, _activated(gate_NK, activation).mul_(grad_NK)


_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}


@dataclass(frozen=True)
class Kernels:
    """What layers are computed by, whoever wrote it; gradients to every tensor.

    Attributes:
        norm: input (normalised over its last dimension), weight and formula -> output.
        gated: gate, up, activation -> ``act(gate) up``, any shape.
        gated_halves: the same where the first half of the last dimension is the gate, the second ``up``.
    """

    norm: Callable[[torch.Tensor, torch.Tensor, Norm], torch.Tensor]
    gated: Callable[[torch.Tensor, torch.Tensor, Activation], torch.Tensor]
    gated_halves: Callable[[torch.Tensor, Activation], torch.Tensor]


def kernels(bodies: Bodies) -> Kernels:
    """The functions of this module with the arithmetic given."""
    return Kernels(partial(_norm, bodies), partial(_gated, bodies), partial(_gated_halves, bodies))


def _norm(bodies: Bodies, x: torch.Tensor, weight_H: torch.Tensor, how: Norm) -> torch.Tensor:
    y_NH: torch.Tensor = _RMSNorm.apply(x.reshape(-1, x.shape[-1]), weight_H, how, bodies)
    return y_NH.view(x.shape)


def _gated(bodies: Bodies, gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    width = gate.shape[-1]
    y_NK: torch.Tensor = _Gated.apply(gate.reshape(-1, width), up.reshape(-1, width), activation, bodies)
    return y_NK.view(gate.shape)


def _gated_halves(bodies: Bodies, both: torch.Tensor, activation: Activation) -> torch.Tensor:
    y_NK: torch.Tensor = _GatedHalves.apply(both.reshape(-1, both.shape[-1]), activation, bodies)
    return y_NK.view(*both.shape[:-1], -1)


PLAIN = Bodies(norm_body, norm_back_body, gate_body, gate_back_body)
EAGER = kernels(PLAIN)


def _accurate(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _shifted(weight_H: torch.Tensor, how: Norm, dtype: torch.dtype) -> torch.Tensor:
    weight_H = weight_H.to(dtype)
    return weight_H + how.offset if how.offset else weight_H


def _activated(gate: torch.Tensor, activation: Activation) -> torch.Tensor:
    return silu(gate) if activation == "silu" else gelu(gate, approximate=_APPROXIMATE[activation])


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NH: torch.Tensor, weight_H: torch.Tensor, how: Norm, bodies: Bodies) -> torch.Tensor:
        y_NH, inverse_N1 = bodies.norm(x_NH, weight_H, how)
        ctx.save_for_backward(x_NH, weight_H, inverse_N1)
        ctx.how, ctx.bodies = how, bodies
        return y_NH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        return (*ctx.bodies.norm_back(grads[0], *ctx.saved_tensors, ctx.how, ctx.needs_input_grad[1]), None, None)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_NK: torch.Tensor, up_NK: torch.Tensor, activation: Activation, bodies: Bodies) -> torch.Tensor:
        ctx.save_for_backward(gate_NK, up_NK)
        ctx.activation, ctx.bodies = activation, bodies
        return bodies.gate(gate_NK, up_NK, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        return (*ctx.bodies.gate_back(grads[0], *ctx.saved_tensors, ctx.activation), None, None)


class _GatedHalves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: torch.Tensor, activation: Activation, bodies: Bodies) -> torch.Tensor:
        ctx.save_for_backward(both)
        ctx.activation, ctx.bodies = activation, bodies
        return bodies.gate(*both.chunk(2, dim=-1), activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        (both,) = ctx.saved_tensors
        return torch.cat(ctx.bodies.gate_back(grads[0], *both.chunk(2, dim=-1), ctx.activation), dim=-1), None, None

"""Finds the RMS norms and gated activations of a model by what they compute, and lets them run as ``model/fused.py`` has them.

Nothing is known by name. A norm is a module with one weight of one dimension and a small number; which formula it is, numbers
put through a copy of it say: outputs, gradients, and where it rounds. A gated layer is a module of linear layers and an
activation; the linear layers of a copy are replaced by numbers of our own, and what it hands to its last layer is compared.
Modules that compute anything else are left as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch

from tunesmith.model.fused import EAGER, Activation, Kernels, Norm

_SMALL = (1e-12, 1e-2)
"""What is added to a mean of squares lies between these."""
_EXACT = 1e-5
"""Relative difference in float32 that is rounding."""


@dataclass(frozen=True)
class Fused:
    """How many modules of a model run fused."""

    norms: int
    gates: int


@dataclass(frozen=True)
class _Gate:
    """Names of the linear layers of a gated layer: those of gate and up, or one whose halves these are; and the last one."""

    first: tuple[str, ...]
    gate: int
    last: str
    activation: Activation


def fuse(model: torch.nn.Module, kernels: Kernels = EAGER) -> Fused:
    """Let norms and gated layers of a model run fused wherever gradients are recorded, for as long as the model lives.

    What is saved is not affected. The model may be on the meta device.

    Args:
        model: adapted or not.
        kernels: what computes them.
    """
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.device("cpu"):
        torch.manual_seed(0)
        found = [*_find(model)]
    for module, how in found:
        assert isinstance(how, Norm | _Gate)
        plain = module.forward
        module.forward = (
            _FusedNorm(module, how, kernels, plain) if isinstance(how, Norm) else _FusedGate(module, how, kernels, plain)
        )
    norms = sum(isinstance(how, Norm) for _, how in found)
    return Fused(norms, len(found) - norms)


def unfuse(model: torch.nn.Module) -> Callable[[], None]:
    """Give the modules their own forward again; returns what puts the fused one back. For comparisons."""
    removed = [
        (m, m.__dict__.pop("forward"))
        for m in model.modules()
        if isinstance(m.__dict__.get("forward"), _FusedNorm | _FusedGate)
    ]

    def back() -> None:
        for module, fused in removed:
            module.__dict__["forward"] = fused

    return back


class _FusedNorm:
    """Stands in a norm for its forward. An object and no closure, so that a deep copy of a model refers to its own modules."""

    def __init__(self, module: torch.nn.Module, how: Norm, kernels: Kernels, plain: Callable[..., Any]) -> None:
        self._module, self._how, self._kernels, self._plain = module, how, kernels, plain

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs or not torch.is_grad_enabled():
            return self._plain(x, *args, **kwargs)
        weight: Any = self._module.weight
        return self._kernels.norm(x, weight, self._how)


class _FusedGate:
    """Stands in a gated layer for its forward."""

    def __init__(self, module: torch.nn.Module, how: _Gate, kernels: Kernels, plain: Callable[..., Any]) -> None:
        self._module, self._how, self._kernels, self._plain = module, how, kernels, plain

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs or not torch.is_grad_enabled():
            return self._plain(x, *args, **kwargs)
        layers, how = self._module._modules, self._how
        made = [_call(layers[name], x) for name in how.first]
        if len(made) == 1:
            return _call(layers[how.last], self._kernels.gated_halves(made[0], how.activation))
        return _call(layers[how.last], self._kernels.gated(made[how.gate], made[1 - how.gate], how.activation))


def _call(layer: torch.nn.Module | None, x: torch.Tensor) -> torch.Tensor:
    assert layer is not None
    return layer(x)


# ---- finding


def _find(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, Norm | _Gate]]:
    known: dict[Any, Norm | _Gate | None] = {}
    for module in model.modules():
        if "forward" in module.__dict__:
            continue
        look, key = _what_to_try(module)
        if look is None:
            continue
        if key not in known:
            try:
                known[key] = look(module)
            except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError):
                known[key] = None  # it needs something else than a hidden state
        how = known[key]
        if how is not None:
            yield module, how


def _what_to_try(module: torch.nn.Module) -> tuple[Callable[[torch.nn.Module], Norm | _Gate | None] | None, Any]:
    """What would find the formula of a module, and what those have in common that compute the same."""
    own = dict(module.named_parameters(recurse=False))
    children = dict(module.named_children())
    if not children and [*own] == ["weight"] and own["weight"].ndim == 1 and len(_small_numbers(module)) == 1:
        return _find_norm, (type(module), len(own["weight"]), _plain_values(module))
    linear = [name for name, child in children.items() if _is_linear(child)]
    if not own and len(linear) in (2, 3) and len(children) == len(linear) + 1:
        kinds = tuple(name if _is_linear(child) else (type(child), _plain_values(child)) for name, child in children.items())
        return _find_gate, (type(module), _plain_values(module), kinds)
    return None, None


def _plain_values(module: torch.nn.Module) -> tuple[tuple[str, Any], ...]:
    """Numbers, names and switches that a module has: those of one class may compute otherwise in some layers."""
    return tuple((name, value) for name, value in vars(module).items() if isinstance(value, int | float | str))


def _trial(module: torch.nn.Module) -> torch.nn.Module:
    """A copy that may be changed, without hooks and in training, where a layer may do more (Seed-OSS: dropout at its end)."""
    trial = copy.copy(module)
    trial._forward_hooks, trial._forward_pre_hooks = type(trial._forward_hooks)(), type(trial._forward_pre_hooks)()
    trial.training = True
    return trial


def _small_numbers(module: torch.nn.Module) -> list[float]:
    return [value for value in vars(module).values() if isinstance(value, float) and _SMALL[0] <= value <= _SMALL[1]]


def _is_linear(module: torch.nn.Module) -> bool:
    """A linear layer, quantised and adapted ones included."""
    return isinstance(getattr(module, "in_features", None), int) and isinstance(getattr(module, "out_features", None), int)


def _find_norm(module: torch.nn.Module) -> Norm | None:
    width = len(dict(module.named_parameters())["weight"])
    weight = torch.nn.Parameter(torch.randn(width))
    trial = _trial(module)
    trial._parameters = {"weight": weight}
    x = torch.randn(4, width) * torch.tensor([[1.0], [100.0], [3e-3], [1e-5]])
    grad = torch.randn(4, width)
    eps = _small_numbers(module)[0]
    expected = _with_gradients(trial, weight, x, grad)
    near = []
    for how in (Norm(eps, offset, late) for offset in (0.0, 1.0) for late in (False, True)):
        made = _with_gradients(partial(_own_norm, weight, how), weight, x, grad)
        if all(map(_near, made, expected)):
            near.append(how)
    with torch.no_grad():
        weight.data = weight.bfloat16()
        wanted = trial(x.bfloat16())
        differ = {how: (_own_norm(weight, how, x.bfloat16()) != wanted).float().mean().item() for how in near}
    # another order of the same sums rounds few numbers otherwise, rounding at another place a third of them
    return min((how for how in near if differ[how] < 0.05), key=lambda how: differ[how], default=None)


def _own_norm(weight: torch.Tensor, how: Norm, x: torch.Tensor) -> torch.Tensor:
    return EAGER.norm(x, weight, how)


def _with_gradients(
    compute: Callable[[torch.Tensor], torch.Tensor], weight: Any, x: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Output, and gradients of the input and the weight."""
    x = x.clone().requires_grad_(True)
    y = compute(x)
    return (y.detach(), *torch.autograd.grad(y, (x, weight), grad))


def _near(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether they are equal but for rounding, row by row."""
    return one.shape == other.shape and bool(((one - other).norm(dim=-1) <= _EXACT * other.norm(dim=-1)).all())


class _Given(torch.nn.Module):
    """Stands for a linear layer: gives a number for what it is handed, and remembers that."""

    def __init__(self, name: str, gives: torch.Tensor, called: list[tuple[str, torch.Tensor]]) -> None:
        super().__init__()
        self._name, self._gives, self._called = name, gives, called

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._called.append((self._name, x))
        return self._gives


def _find_gate(module: torch.nn.Module) -> _Gate | None:
    linear = [name for name, child in module._modules.items() if child is not None and _is_linear(child)]
    called: list[tuple[str, torch.Tensor]] = []
    width = 6 if len(linear) == 3 else 12
    gives = {name: torch.randn(4, 1, width).mul(3).requires_grad_(True) for name in linear}
    trial = _trial(module)
    trial._modules = {**module._modules, **{name: _Given(name, gives[name], called) for name in linear}}
    x = torch.randn(4, 1, 8)
    y = trial(x)
    *first, (last, product) = called
    if y is not gives[last] or len(called) != len(linear) or any(given is not x for _, given in first):
        return None
    names = tuple(name for name, _ in first)
    inputs = [gives[name] for name in names]
    grad = torch.randn_like(product)
    expected = (product.detach(), *torch.autograd.grad(product, inputs, grad))
    for activation in get_args(Activation):
        for gate in range(len(names)):
            made = (
                EAGER.gated_halves(inputs[0], activation)
                if len(names) == 1
                else EAGER.gated(inputs[gate], inputs[1 - gate], activation)
            )
            if all(map(_near, (made.detach(), *torch.autograd.grad(made, inputs, grad)), expected)):
                return _Gate(names, gate, last, activation)
    return None

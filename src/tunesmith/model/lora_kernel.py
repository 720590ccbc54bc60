"""Plain LoRA layers as one autograd function: nothing is computed for frozen weights, and only the input is kept.

PEFT's forward casts the input to the adapter's float32, keeps both, and runs two small products and two additions that autograd
records one by one. Here ``y = W x + s B A x`` is one node of the graph. Layers that are given the same input one after the
other (query, key, value; gate, up) are one node together: one product for all their ``A``, one sum for the input's gradient.
Adapters stay PEFT's own float32 parameters and are cast once for each forward pass.

Each layer looks again at every call: with adapters switched off or merged, several of them active, dropout, hooks on its parts,
a variant such as DoRA, or in a dtype that is not autocast's, PEFT's forward runs as if nothing had been put in its place.

``T`` tokens, ``I`` and ``O`` a layer's inputs and outputs, ``R`` ranks of all layers of a node together.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.import_utils import is_bnb_4bit_available
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch.autograd.function import once_differentiable

from tunesmith.model.adapter import unwrap
from tunesmith.model.forward import FlatForward, probe_batch
from tunesmith.model.phantom import RoundedLinear
from tunesmith.model.precision import autocast

Forward = Callable[..., torch.Tensor]


def install_lora_kernel(forward: FlatForward, dtype: torch.dtype) -> int:
    """Let the LoRA layers of a model run through the kernel, for as long as the model lives; what is saved is not affected.

    Which layers share an input is seen by running the model on a few tokens.

    Args:
        forward: of the model, with its adapter.
        dtype: that training computes in.

    Returns:
        How many layers do.
    """
    layers = [layer for layer in forward.model.modules() if _is_plain(layer)]
    with autocast(unwrap(forward.model).device, dtype):
        groups = _with_one_input(forward, layers) if layers else []
    for layers in groups:
        _Node(layers)
    return sum(len(layers) for layers in groups)


def remove_lora_kernel(model: torch.nn.Module) -> Callable[[], None]:
    """Give the layers PEFT's forward again; returns what puts the kernel back. For comparisons."""
    removed = [(m, m.__dict__.pop("forward")) for m in model.modules() if isinstance(m.__dict__.get("forward"), _Place)]

    def back() -> None:
        for module, place in removed:
            module.__dict__["forward"] = place

    return back


def _is_plain(layer: Any) -> bool:
    """Whether a layer adapts a matrix, and its base is one that ``_matrix`` knows. Adapters are looked at when it is called."""
    if type(layer) is LoraLinear:
        base = layer.get_base_layer()
        plain = type(base) is torch.nn.Linear or (isinstance(base, RoundedLinear) and base.bits == 4)
        return plain and not layer.fan_in_fan_out
    if is_bnb_4bit_available():
        from bitsandbytes.nn import Linear4bit
        from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit

        if type(layer) is LoraLinear4bit:
            return type(layer.get_base_layer()) is Linear4bit
    return False


@torch.no_grad()
def _with_one_input(forward: FlatForward, layers: list[torch.nn.Module]) -> list[list[LoraLayer]]:
    """The layers, those together that are called one after the other with the same tensor."""
    called: list[tuple[torch.nn.Module, torch.Tensor]] = []
    handles = [layer.register_forward_pre_hook(lambda layer, inputs: called.append((layer, inputs[0]))) for layer in layers]
    training = forward.model.training
    forward.model.eval()
    try:
        forward.logits(probe_batch(unwrap(forward.model)))
    finally:
        for handle in handles:
            handle.remove()
        forward.model.train(training)
    times = {layer: sum(other is layer for other, _ in called) for layer, _ in called}
    groups: list[list[LoraLayer]] = []
    before = None
    for layer, x in called:
        assert isinstance(layer, LoraLayer)
        if times[layer] == 1 and x is before:
            groups[-1].append(layer)
        elif times[layer] == 1 or all(layer not in group for group in groups):
            groups.append([layer])
        before = x if times[layer] == 1 else None
    return groups


class _Node:
    """Runs layers that share an input: the first that is called computes all of them, the others take their part.

    Args:
        layers: in the order in which they are called; their forward is replaced.
    """

    def __init__(self, layers: Sequence[LoraLayer]) -> None:
        self.layers = tuple(layers)
        self._given: weakref.ref[torch.Tensor] | None = None
        self._waiting: dict[int, torch.Tensor] = {}
        for number, layer in enumerate(layers):
            layer.forward = _Place(self, number, layer.forward)

    def compute(self, number: int, x: torch.Tensor) -> torch.Tensor | None:
        """What the layer of this number gives for ``x``; None if PEFT is to compute it."""
        if self._given is not None and self._given() is x and number in self._waiting:
            return self._waiting.pop(number)
        self._given, self._waiting = None, {}
        layers = self.layers if number == 0 else self.layers[number : number + 1]
        adapters = [_adapter(layer, x) for layer in layers]
        if adapters[0] is None:
            return None
        if None in adapters:
            layers, adapters = layers[:1], adapters[:1]
        first, *rest = _run(x, layers, [name for name in adapters if name is not None])
        if rest:
            self._given, self._waiting = weakref.ref(x), dict(enumerate(rest, 1))
        return first


class _Place:
    """Stands in a layer for its forward. An object and no closure, so that a deep copy of a model refers to its own layers."""

    def __init__(self, node: _Node, number: int, plain: Forward) -> None:
        self._node, self._number, self._plain = node, number, plain

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        found = None if args or kwargs else self._node.compute(self._number, x)
        return self._plain(x, *args, **kwargs) if found is None else found


def plain_adapter(layer: torch.nn.Module) -> str | None:
    """The one adapter of a layer that adds ``s B A x`` to a frozen matrix's product and does nothing else, or None."""
    if not _is_plain(layer):
        return None
    assert isinstance(layer, LoraLayer)
    return _one_adapter(layer)


def _adapter(layer: LoraLayer, x: torch.Tensor) -> str | None:
    """The one adapter that is to be computed here, or None if the layer is to run as PEFT has it."""
    name = _one_adapter(layer)
    if name is None or torch.is_autocast_enabled(x.device.type) or x.dtype == layer.lora_A[name].weight.dtype:
        return name
    return None


def _one_adapter(layer: LoraLayer) -> str | None:
    if layer.disable_adapters or layer.merged:
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1:
        return None
    name = active[0]
    down, up = layer.lora_A[name], layer.lora_B[name]
    if name in layer.lora_variant or type(layer.lora_dropout[name]) is not torch.nn.Identity or up.bias is not None:
        return None
    base = layer.get_base_layer()
    if any(part._forward_hooks or part._forward_pre_hooks for part in (base, down, up)):
        return None
    if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return None
    return name


def _run(x: torch.Tensor, layers: Sequence[LoraLayer], adapters: Sequence[str]) -> list[torch.Tensor]:
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    factors: list[torch.Tensor] = []
    for layer, name in zip(layers, adapters, strict=True):
        factors += [layer.lora_A[name].weight, layer.lora_B[name].weight]
    bases = [layer.get_base_layer() for layer in layers]
    scales = [layer.scaling[name] for layer, name in zip(layers, adapters, strict=True)]
    outputs = _Lora.apply(x.reshape(-1, x.shape[-1]).to(dtype), bases, scales, *factors)
    return [y_TO.view(*x.shape[:-1], y_TO.shape[-1]) for y_TO in outputs]


def _matrix(base: torch.nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """``[O, I]``; of 4 bits, unpacked for this moment as bitsandbytes does it."""
    if isinstance(base, RoundedLinear):
        return base.unfolded(dtype)
    weight: Any = base.weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight.to(dtype)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, state).to(dtype)


class _Lora(torch.autograd.Function):
    """``y_i = W_i x + b_i + s_i B_i A_i x`` for all layers of a node; gradients to ``x``, ``A_i`` and ``B_i``.

    Inputs after the scales: ``A_1, B_1, A_2, B_2, ...``.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TI: torch.Tensor, bases: list[torch.nn.Module], scales: list[float], *factors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ranks = [down.shape[0] for down in factors[::2]]
        downs_RI = torch.cat(factors[::2]).to(x_TI.dtype)
        ups = [up.to(x_TI.dtype) for up in factors[1::2]]
        low_TR = x_TI @ downs_RI.t()
        outputs = []
        for base, scale, up, low in zip(bases, scales, ups, low_TR.split(ranks, dim=1), strict=True):
            bias: Any = base.bias
            y_TO = torch.nn.functional.linear(x_TI, _matrix(base, x_TI.dtype), None if bias is None else bias.to(x_TI.dtype))
            outputs.append(y_TO.addmm_(low, up.t(), alpha=scale))
        ctx.save_for_backward(x_TI, downs_RI, low_TR, *ups)
        ctx.bases, ctx.scales, ctx.ranks, ctx.dtypes = bases, scales, ranks, [factor.dtype for factor in factors]
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        x_TI, downs_RI, low_TR, *ups = ctx.saved_tensors
        need_x, _, _, *need_factors = ctx.needs_input_grad
        back_TR = torch.empty_like(low_TR)
        parts = zip(grads, ctx.bases, ctx.scales, ups, low_TR.split(ctx.ranks, 1), back_TR.split(ctx.ranks, 1), strict=True)
        grad_TI = None
        up_grads = []
        for dy_TO, base, scale, up, low, back in parts:
            back.copy_(dy_TO @ up).mul_(scale)
            up_grads.append(dy_TO.t() @ low)
            if need_x and grad_TI is None:
                grad_TI = dy_TO @ _matrix(base, x_TI.dtype)
            elif grad_TI is not None:
                grad_TI.addmm_(dy_TO, _matrix(base, x_TI.dtype))
        if grad_TI is not None:
            grad_TI.addmm_(back_TR, downs_RI)
        down_grads = (back_TR.t() @ x_TI).split(ctx.ranks)
        found: list[torch.Tensor | None] = []
        for down_grad, up_grad, scale in zip(down_grads, up_grads, ctx.scales, strict=True):
            number = len(found)
            found.append(down_grad.to(ctx.dtypes[number]) if need_factors[number] else None)
            found.append(up_grad.to(ctx.dtypes[number + 1]) * scale if need_factors[number + 1] else None)
        return grad_TI, None, None, *found

"""A model without weights, and how many bytes its tensors would hold: what a step needs is found by running it on nothing.

Tensors of numbers are fake (torch's ``FakeTensor``: a shape, a dtype and a device, no memory); tensors of indices are real, so
that whatever looks at tokens, positions or boundaries works as ever. Autograd itself decides what is kept for the backward
pass, so any architecture, attention, tuning type and checkpointing is accounted for as torch would do it.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.weak import WeakIdKeyDictionary

_READS = torch.ops.aten._local_scalar_dense.default
_PICKS = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default,
          torch.ops.aten._index_put_impl_.default}  # fmt: skip
_BY_GROUP = torch.ops.aten._grouped_mm.default
_RANKS = {torch.ops.aten.topk.default, torch.ops.aten.sort.default, torch.ops.aten.sort.stable}


class LiveBytes(TorchDispatchMode):
    """Follows every storage from its allocation to its release. A context in which tensors are made and used.

    Args:
        fake: the mode that makes numbers fake; None: everything is real, and only counted.

    Attributes:
        kind: what storages that are made now are counted as.
        phase: where peaks are noted.
        live: kind -> bytes held now.
        peaks: phase -> (kind -> bytes) at the moment when the sum was highest.
    """

    def __init__(self, fake: FakeTensorMode | None = None) -> None:
        super().__init__()
        self.fake = fake
        self.kind, self.phase = "other", "start"
        self.live: Counter[str] = Counter()
        self.peaks: dict[str, Counter[str]] = {}
        self._total = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = tree_flatten((args, kwargs))[0]
        if self.fake is None:
            result = func(*args, **kwargs)
        elif any(isinstance(value, FakeTensor) for value in given):
            result = self._on_fakes(func, args, kwargs)
        else:
            result = self._on_indices(func, args, kwargs)
        for value in tree_flatten(result)[0]:
            if isinstance(value, torch.Tensor):
                self.count(value)
        return result

    def _on_fakes(self, func: Any, args: Any, kwargs: Any) -> Any:
        assert self.fake is not None
        if func is _READS:  # a loss or a norm, looked at by the loop
            return 1.0
        if func is _BY_GROUP:  # the product of experts, which torch's fake refuses for float32
            with self.fake:
                return args[0].new_empty(_grouped_shape(*args))
        if func in _PICKS:
            mask = lambda value: isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor)  # noqa: E731
            indices = [
                part
                for index in args[1]
                for part in (index.nonzero().unbind(1) if mask(index) and index.dtype == torch.bool else (index,))
            ]
            args = (args[0], indices, *args[2:])
        result = func(*args, **kwargs)
        if func in _RANKS:  # who is chosen cannot be known: everyone in turn
            values, numbers = result
            size = max(args[0].shape[-1] if args[0].ndim else 1, 1)
            return values, (torch.arange(numbers.numel()) % size).reshape(numbers.shape)
        return result

    def _on_indices(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Fake if an operation without fakes makes numbers; else it is done."""
        assert self.fake is not None
        try:
            with self.fake:
                result = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            return func(*args, **kwargs)
        made = [value for value in tree_flatten(result)[0] if isinstance(value, torch.Tensor)]
        return result if any(value.is_floating_point() for value in made) else func(*args, **kwargs)

    def count(self, tensor: torch.Tensor) -> None:
        """Count the storage of a tensor, if it has not been counted."""
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        size, kind = storage.nbytes(), [self.kind]
        self._known[storage] = kind
        self._add(kind[0], size)
        weakref.finalize(storage, self._release, kind, size)

    def recount(self, tensor: torch.Tensor, kind: str) -> None:
        """Count the storage of a tensor as something else from now on."""
        storage = tensor.untyped_storage()
        known = self._known.get(storage)
        if known is not None and known[0] != kind:
            size = storage.nbytes()
            self.live[known[0]] -= size
            self.live[kind] += size
            known[0] = kind

    def _add(self, kind: str, size: int) -> None:
        self.live[kind] += size
        self._total += size
        highest = self.peaks.get(self.phase)
        if highest is None or self._total > highest.total():
            self.peaks[self.phase] = self.live.copy()

    def _release(self, kind: list[str], size: int) -> None:
        self.live[kind[0]] -= size
        self._total -= size


def _grouped_shape(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor | None = None, *_: Any) -> tuple[int, ...]:
    """Shape of the products of groups: groups are rows of ``a``, columns of ``b``, or what both are summed over."""
    if a.ndim == 2 and b.ndim == 3:
        return (a.shape[0], b.shape[2])
    if a.ndim == 3:
        return (a.shape[0], a.shape[1], b.shape[2]) if b.ndim == 3 else (a.shape[1], b.shape[1])
    assert ends is not None
    return (ends.shape[0], a.shape[0], b.shape[1])


# ---- models


class RoundedLinear(torch.nn.Linear):
    """Stands for bitsandbytes' linear layer, which holds its weights in few bits and unfolds them for each product.

    Args:
        layer: the layer that it takes the place of; on the meta device.
        bits: of a weight.
    """

    def __init__(self, layer: torch.nn.Linear, bits: int) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias, self.bits = layer.in_features, layer.out_features, layer.bias, bits
        self.scales = torch.nn.Buffer(torch.empty(_scales(layer, bits), dtype=torch.uint8, device="meta"))
        packed = torch.empty(layer.weight.numel() * bits // 8, dtype=torch.uint8, device="meta")
        self.weight = torch.nn.Parameter(packed, requires_grad=False)

    def unfolded(self, dtype: torch.dtype) -> torch.Tensor:
        """The weights ``[out_features, in_features]`` for one product."""
        return torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.weight.device)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The product by the weights as they are unfolded; in the input's dtype, as bitsandbytes does it."""
        if self.bits == 8:  # computes in the dtype that it gets, and keeps what it gets
            result: torch.Tensor = _Unfolded.apply(input, self, input)
        else:
            device = input.device.type
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
            result = _Unfolded.apply(input.to(dtype), self).to(input.dtype)
        return result if self.bias is None else result + self.bias.to(result.dtype)


def _scales(layer: torch.nn.Linear, bits: int) -> int:
    """Bytes beside the weights themselves: a scale for each row, or one of 32 bits for each 64 weights, at most."""
    return 4 * (layer.out_features if bits == 8 else -(-layer.weight.numel() // 64))


class _Unfolded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, layer: RoundedLinear, kept: torch.Tensor | None = None) -> torch.Tensor:
        ctx.layer, ctx.kept = layer, kept
        return input @ layer.unfolded(input.dtype).t()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient @ ctx.layer.unfolded(gradient.dtype), None, None


def round_layers(model: torch.nn.Module, bits: int, head: torch.nn.Module | None) -> None:
    """Put ``RoundedLinear`` in the place of every linear layer but the output head."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear and child is not head:
                setattr(parent, name, RoundedLinear(child, bits))


def make_fake(model: torch.nn.Module, live: LiveBytes, device: torch.device) -> None:
    """Turn a model on the meta device into one of fake tensors on ``device``, and count them; tied weights stay tied."""
    assert live.fake is not None
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        held: Iterator[tuple[dict[str, Any], str, torch.Tensor]] = (
            (kind, name, value)
            for kind in (module._parameters, module._buffers)
            for name, value in kind.items()
            if value is not None
        )
        for kind, name, value in list(held):
            if id(value) not in made:
                with live.fake:
                    empty = torch.empty(value.shape, dtype=value.dtype, device=device)
                is_parameter = isinstance(value, torch.nn.Parameter)
                made[id(value)] = torch.nn.Parameter(empty, value.requires_grad) if is_parameter else empty
                live.count(made[id(value)])
            kind[name] = made[id(value)]

"""Linear layers whose weights lie as the processor's bf16 products want them, for as long as many small products follow.

A product of a few rows with a weight spends half its time on arranging the weight. While answers are generated the weights do
not change, so it is done once, and so are the casts of the factors of plain LoRA layers. Sums are rounded where training rounds
them: an adapter as further columns of its weight would be faster still, but tokens would be drawn from probabilities that are
further from training's.

Costs a copy of the weights in 16 bits; not done where memory is short, on other devices, or in other dtypes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from peft.tuners.lora import LoraLayer

from tunesmith.model.lora_kernel import plain_adapter
from tunesmith.model.memory import available_memory

_ROWS = 32
"""Rows that products are arranged for; others run as well."""
_SMALL = 1 << 14
"""Numbers of a weight below which it is left as it is."""
_SHARE = 0.5
"""Of the memory that is left, what copies may take."""


@contextmanager
def packed_linears(model: torch.nn.Module, dtype: torch.dtype) -> Iterator[int]:
    """Within this context linear layers run on arranged copies of their weights; for use without gradients.

    Args:
        model: plain or adapted, its adapters switched as they will be used.
        dtype: of matrix products.

    Yields:
        How many layers do; 0 where nothing is won.
    """
    chosen = _chosen(model) if dtype == torch.bfloat16 and _arranges() else {}
    free = available_memory(torch.device("cpu"))
    if free is not None and sum(2 * base.weight.numel() for base, _ in chosen.values()) > _SHARE * free:
        chosen = {}
    before = {layer: layer.__dict__.get("forward") for layer in chosen}
    try:
        for layer, (base, adapter) in chosen.items():
            layer.forward = _packed(base, layer if isinstance(layer, LoraLayer) else None, adapter)
        yield len(chosen)
    finally:
        for layer, forward in before.items():
            layer.__dict__.pop("forward", None)
            if forward is not None:
                layer.forward = forward


@cache
def _arranges() -> bool:
    """Whether this build and processor have such products."""
    return (
        torch.backends.mkldnn.is_available()
        and all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
        and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    )


def _chosen(model: torch.nn.Module) -> dict[torch.nn.Module, tuple[torch.nn.Linear, str]]:
    """Layer -> the linear layer that it is or adapts, and its adapter; empty: none."""
    found: dict[torch.nn.Module, tuple[torch.nn.Linear, str]] = {}
    within = set[torch.nn.Module]()
    for layer in model.modules():  # a layer that adapts comes before the one in it
        adapter = plain_adapter(layer)
        if isinstance(layer, LoraLayer) and adapter is not None and type(layer.get_base_layer()) is torch.nn.Linear:
            found[layer] = (layer.get_base_layer(), adapter)
            within.update(layer.modules())
        elif type(layer) is torch.nn.Linear and layer not in within:
            found[layer] = (layer, "")
    return {
        layer: one for layer, one in found.items() if one[0].weight.numel() >= _SMALL and one[0].weight.device.type == "cpu"
    }


def _packed(base: torch.nn.Linear, layer: LoraLayer | None, adapter: str) -> Callable[[torch.Tensor], torch.Tensor]:
    weight_OI = base.weight.detach().to(torch.bfloat16)
    bias_O = None if base.bias is None else base.bias.detach().to(torch.bfloat16)
    arranged = torch.ops.mkldnn._reorder_linear_weight(weight_OI, _ROWS)

    def plain(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x.to(torch.bfloat16), arranged, bias_O, "none", [], "")

    if layer is None:
        return plain
    down_IR = layer.lora_A[adapter].weight.detach().to(torch.bfloat16).t()
    up_RO = layer.lora_B[adapter].weight.detach().to(torch.bfloat16).t()
    scale = layer.scaling[adapter]

    def adapted(x: torch.Tensor) -> torch.Tensor:
        x_TI = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
        return plain(x_TI).addmm_(x_TI @ down_IR, up_RO, alpha=scale).view(*x.shape[:-1], -1)

    return adapted

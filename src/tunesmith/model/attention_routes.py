"""Attention of segments by what the device offers: which kernel computes it, and how each is asked.

``own``: ``attention_kernel.py``, everywhere and for everything; what a CPU uses. ``varlen``: torch's variable-length attention,
``flash``: the package flash-attn, both for 16-bit numbers on CUDA GPUs that have them. ``masked``: the library's attention with
a mask of blocks, on any other device. All see the same: each row itself only, up to its window,
and what it goes on from.

``T`` tokens of the flat batch, ``h`` query heads, ``k`` key heads, ``d`` width of a head.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from itertools import accumulate, pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.weak import WeakIdKeyDictionary

from tunesmith.model.attention_kernel import Variant, as_autocast, attend
from tunesmith.model.stacks import Span

log = logging.getLogger(__name__)

Route = Literal["own", "varlen", "flash", "masked"]

_SAID: dict[Route, str] = {
    "own": "blocks of matrix products",
    "varlen": "torch's variable-length attention",
    "flash": "flash-attn",
    "masked": "the library's attention with a mask of blocks",
}
_TILE = 1024
"""Queries of a mask at most, so that it does not grow with the square of the batch."""

_MASKS = WeakIdKeyDictionary()
"""Boundaries of a batch -> what all layers share: masks of its tiles by window, the boundaries on the device."""


@dataclass(frozen=True)
class Segments:
    """Rows of a flat batch.

    Attributes:
        boundaries: ``[0, l1, l1 + l2, ...]`` as the model hands it on, on the host.
        edges: the same, or finer, as numbers.
        before: for each segment the tokens elsewhere that it goes on from; empty: none for any.
    """

    boundaries: torch.Tensor
    edges: Sequence[int]
    before: Sequence[Span] = ()

    @property
    def longest(self) -> int:
        """Tokens of the longest segment, those that it goes on from included."""
        return max(self.key_lengths, default=0)

    @property
    def key_lengths(self) -> list[int]:
        """Tokens of each segment, those that it goes on from included."""
        own = [end - begin for begin, end in pairwise(self.edges)]
        return [length + last - first for length, (first, last) in zip(own, self.before, strict=True)] if self.before else own

    @property
    def key_tokens(self) -> np.ndarray:
        """Those tokens of all segments, one segment after the other."""
        spans = zip(self.before, pairwise(self.edges), strict=True)
        return np.concatenate([np.arange(*span) for both in spans for span in both])

    def shared(self, what: Any, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What ``make`` made when this was first asked for this batch."""
        kept = _MASKS.setdefault(self.boundaries, {})
        if what not in kept:
            kept[what] = make()
        made: torch.Tensor = kept[what]
        return made


def route(
    query: torch.Tensor, value: torch.Tensor, variant: Variant, sinks_h: torch.Tensor | None, going_on: bool = False
) -> Route:
    """Which kernel computes this: the fastest that can, by device, dtype, widths and variant.

    Args:
        query: ``[1, h, T, d]``, in the dtype that is computed in.
        value: ``[1, k, T, e]``.
        variant: window, bound, dropout.
        sinks_h: scores of sinks, or None.
        going_on: whether segments go on from tokens elsewhere.
    """
    if query.device.type == "cpu" or sinks_h is not None:
        return "own"
    half, width = query.dtype in (torch.float16, torch.bfloat16), query.shape[3]
    if query.device.type == "cuda" and half and width == value.shape[3] and width % 8 == 0 and width <= 256:
        modern = _capability(query.device) >= (8, 0)
        if modern and not variant.dropout and variant.cap is None and "window_size" in _varlen_takes():
            return "varlen"
        if modern and find_spec("flash_attn") is not None:
            return "flash"
    return "own" if variant.cap is not None or going_on else "masked"


def compute(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    scale: float,
    variant: Variant,
    sinks_h: torch.Tensor | None,
    say: bool,
) -> torch.Tensor:
    """Causal attention of each segment to itself, by the kernel that ``route`` names.

    Args:
        query: ``[1, h, T, d]``.
        key: ``[1, k, T, d]``.
        value: ``[1, k, T, e]``.
        segments: which tokens belong together.
        scale: factor of the scores.
        variant: window, bound, dropout.
        sinks_h: scores of sinks, or None.
        say: log which kernel it is, the first time.

    Returns:
        ``[1, T, h, e]``.
    """
    query, key, value = as_autocast(query, key, value)
    chosen = route(query, value, variant, sinks_h, bool(segments.before))
    if say:
        _say(chosen, query.device.type, str(query.dtype).removeprefix("torch."))
    if chosen == "own":
        return attend(query, key, value, segments.edges, scale, variant, sinks_h, segments.before)
    if chosen == "masked":
        return _masked(query, key, value, segments, scale, variant)
    return (_varlen if chosen == "varlen" else _flash)(query, key, value, segments, scale, variant)


@cache
def _say(chosen: Route, device: str, dtype: str) -> None:
    log.info("attention: rows end to end, by %s (%s, %s)", _SAID[chosen], device, dtype)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def _varlen_takes() -> frozenset[str]:
    """What torch's function is given; it had no windows and no grouped heads at first."""
    return frozenset(inspect.signature(varlen_attn).parameters)


def _flat(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """``[1, h, T, d]`` each -> ``[T, h, d]`` each."""
    return [tensor[0].transpose(0, 1) for tensor in tensors]


def _whole_heads(query: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Keys and values ``[1, k, T, d]`` with each head as often as query heads share it, ``[1, h, T, d]``."""
    return [tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1) for tensor in tensors]


def _bounds(query: torch.Tensor, segments: Segments) -> tuple[torch.Tensor, torch.Tensor]:
    """Where segments of queries end, and of keys, on the device; both kernels align the last query with the last key."""

    def made(lengths: Iterable[int]) -> torch.Tensor:
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(query.device, non_blocking=True)

    count = len(segments.edges)
    own = segments.shared((query.device, count), lambda: made(end - begin for begin, end in pairwise(segments.edges)))
    if not segments.before:
        return own, own
    return own, segments.shared((query.device, count, "keys"), lambda: made(segments.key_lengths))


def _keys(segments: Segments, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Keys and values, those that segments go on from repeated before each of them."""
    if not segments.before:
        return list(tensors)
    device = tensors[0].device
    tokens = segments.shared(
        (device, len(segments.edges), "tokens"), lambda: torch.from_numpy(segments.key_tokens).to(device, non_blocking=True)
    )
    return [tensor.index_select(2, tokens) for tensor in tensors]


def _window(variant: Variant) -> tuple[int, int]:
    """(tokens before, tokens after) that a query sees beside its own, as flash attention counts them."""
    return (-1 if variant.window is None else variant.window - 1, 0)


def _varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scale: float, variant: Variant
) -> torch.Tensor:
    grouped: dict[str, Any] = {}
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in _varlen_takes():
            grouped["enable_gqa"] = True
        else:
            key, value = _whole_heads(query, key, value)
    own, keys = _bounds(query, segments)
    q_Thd, k_Tkd, v_Tkd = _flat(query, *_keys(segments, key, value))
    longest = segments.longest
    out_Thd = varlen_attn(
        q_Thd, k_Tkd, v_Tkd, own, keys, longest, longest, scale=scale, window_size=_window(variant), **grouped
    )
    assert isinstance(out_Thd, torch.Tensor)
    return out_Thd[None]


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scale: float, variant: Variant
) -> torch.Tensor:
    own, keys = _bounds(query, segments)
    longest = segments.longest
    out_Thd: torch.Tensor = importlib.import_module("flash_attn").flash_attn_varlen_func(
        *_flat(query, *_keys(segments, key, value)), own, keys, longest, longest,
        dropout_p=variant.dropout, softmax_scale=scale, causal=True, window_size=_window(variant), softcap=variant.cap or 0.0,
    )  # fmt: skip
    return out_Thd[None]


def _masked(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scale: float, variant: Variant
) -> torch.Tensor:
    key, value = _whole_heads(query, key, value)
    parts = []
    for first, begin, end in _tiles(segments.edges, variant.window):
        make = partial(_mask, query.device, segments.edges, first, begin, end, variant.window)
        mask_QK = segments.shared((query.device, first, begin, end, variant.window), make)
        q, k, v = query[:, :, begin:end], key[:, :, first:end], value[:, :, first:end]
        parts.append(scaled_dot_product_attention(q, k, v, attn_mask=mask_QK, dropout_p=variant.dropout, scale=scale))
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous()


def _tiles(edges: Sequence[int], window: int | None) -> Iterator[tuple[int, int, int]]:
    """(first key, first query, end) of each mask: several short rows, or a part of a long one."""
    opened = edges[0]
    for begin, end in pairwise(edges):
        if end - opened <= _TILE:
            continue
        if opened < begin:
            yield opened, opened, begin
        opened = begin
        if end - begin > _TILE:
            for start in range(begin, end, _TILE):
                yield begin if window is None else max(begin, start - window + 1), start, min(start + _TILE, end)
            opened = end
    if opened < edges[-1]:
        yield opened, opened, edges[-1]


def _mask(device: torch.device, edges: Sequence[int], first: int, begin: int, end: int, window: int | None) -> torch.Tensor:
    """Which keys ``[first, end)`` each query ``[begin, end)`` sees."""
    keys = torch.arange(first, end, device=device)
    rows = torch.searchsorted(torch.tensor(edges[1:], device=device), keys, right=True)
    queries = keys[begin - first :, None]
    seen = (rows[begin - first :, None] == rows) & (keys <= queries)
    return seen if window is None else seen & (keys > queries - window)

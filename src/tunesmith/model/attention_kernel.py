"""Causal attention within segments as blocks of matrix products, with a backward pass of its own.

PyTorch's CPU attention is slow backwards (in bf16 four times as slow as this at 170 tokens, one and a half times at 1,024), and
forwards too where the processor has no tiles for bf16. Here queries are taken in blocks; a block looks at the keys from where
its first query's window begins up to its own end, so that little of what a mask would throw away is computed, and its scores
stay in the cache. Query heads that share a key head are rows of one product, so keys are never repeated. Scores and
probabilities are float32; only ``q``, ``k`` and ``v`` are kept for the backward pass, which makes the probabilities anew:
``dV = P^T dO``, ``dP = dO V^T``, ``dS = P (dP - rowsum(P dP))``, ``dQ = s dS K``, ``dK = s dS^T Q``.

With bounded scores ``c tanh(s q k / c)``, ``dS`` is multiplied by ``1 - tanh^2``. A sink is a score of its head that takes part
in the softmax and gives nothing; its gradient is minus the sum over queries of its probability times ``rowsum(P dP)``. Weights
that dropout took are drawn again from the same seed.

``N`` tokens, ``h`` query heads, ``k`` key heads, ``g`` = h / k; ``d`` width of a head, ``e`` of values; ``m`` queries of a
block, ``M`` = g m; ``L`` tokens of a stack of segments (``stacks.py``), ``B`` = k times the number of its segments.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from tunesmith.model.stacks import Span, stacks
from tunesmith.sampled import sampled

_BLOCK = 64
"""Queries of a block. Of 32, 64, 128, 256 the fastest at 64 to 1,024 tokens (9 query heads on 3 key heads of 64)."""

_TILES = torch.cpu._is_amx_tile_supported()
"""Whether the library's forward pass in bf16 is the faster one."""


@dataclass(frozen=True)
class Variant:
    """What attention does beside looking back over the whole row.

    Attributes:
        window: tokens that a query sees at most, its own included; None for all.
        cap: bound of the scores, ``cap * tanh(score / cap)``; None for none.
        dropout: probability with which a weight is dropped; the others are divided by ``1 - dropout``.
    """

    window: int | None = None
    cap: float | None = None
    dropout: float = 0.0


PLAIN = Variant()


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    edges: Sequence[int],
    scale: float,
    variant: Variant = PLAIN,
    sinks_h: torch.Tensor | None = None,
    before: Sequence[Span] = (),
) -> torch.Tensor:
    """Causal attention of each segment to itself, and to what it goes on from.

    Args:
        query: ``[1, h, T, d]``.
        key: ``[1, k, T, d]``, ``h`` a multiple of ``k``.
        value: ``[1, k, T, e]``.
        edges: boundaries of the segments, ``0, l1, l1 + l2, ..., T``.
        scale: factor of the scores.
        variant: window, bound, dropout.
        sinks_h: a score for each query head that takes part beside those of the keys; None for none.
        before: for each segment, begin and end of tokens elsewhere that come before its own; empty: none for any.

    Returns:
        ``[1, T, h, e]``, contiguous, in the dtype that autocast says, else that of the query.
    """
    assert query.shape[1] % key.shape[1] == 0 and key.shape[:3] == value.shape[:3], (query.shape, key.shape, value.shape)
    query, key, value = as_autocast(query, key, value)
    seed = int(torch.randint(2**62, ())) if variant.dropout else 0
    with torch.autocast(query.device.type, enabled=False):  # it would round the scores
        settings = _Settings(tuple(edges), tuple(before), scale, variant, seed)
        out: torch.Tensor = _Attention.apply(query, key, value, sinks_h, settings)
    return out


def as_autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """In the dtype that autocast says, as for the library's attention; rotated queries and keys may be float32."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


@dataclass(frozen=True)
class _Settings:
    """Segments, what each goes on from, factor of the scores, variant, seed of the dropout."""

    edges: tuple[int, ...]
    before: tuple[Span, ...]
    scale: float
    variant: Variant
    seed: int


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks_h: torch.Tensor | None,
        settings: _Settings,
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value, sinks_h)
        ctx.stacks = stacks(settings.edges, query.shape[1], key.shape[1], settings.before)
        ctx.settings = settings
        weigh, window = _Weigher(query, sinks_h, settings), settings.variant.window
        tiles = _TILES and query.dtype == torch.bfloat16 and sinks_h is None
        tiles = tiles and settings.variant.cap is None and not settings.variant.dropout
        out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
        for stack in sampled(ctx.stacks):
            q_BgLd, k_B1Ld, v_B1Le = stack.take(query), stack.take_keys(key), stack.take_keys(value)
            grouped = q_BgLd.shape[1]
            if tiles and not stack.earlier and (window is None or stack.length <= window):
                o_BgLe = scaled_dot_product_attention(
                    q_BgLd, k_B1Ld, v_B1Le, is_causal=True, scale=settings.scale, enable_gqa=grouped > 1
                )
            else:
                o_BgLe = query.new_empty(*q_BgLd.shape[:3], value.shape[3])
                exact_q, exact_k = q_BgLd.to(weigh.dtype), k_B1Ld[:, 0].to(weigh.dtype)
                for block in sampled(_blocks(stack.length, window, stack.earlier)):
                    given_BMN = weigh(exact_q, exact_k, block).given.to(value.dtype)
                    made_BMe = torch.bmm(given_BMN, v_B1Le[:, 0, block.keys])
                    o_BgLe[:, :, block.queries] = made_BMe.unflatten(1, (grouped, -1))
            stack.put(o_BgLe, out.transpose(1, 2))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, sinks_h = ctx.saved_tensors
        weigh, several = _Weigher(query, sinks_h, ctx.settings), any(ctx.settings.before)
        found = [_same_layout(query), *(_same_layout(t, weigh.dtype if several else t.dtype) for t in (key, value))]
        if several:  # a key's gradient is a sum over segments
            found[1].zero_()
            found[2].zero_()
        lost_h = None if sinks_h is None else torch.zeros_like(sinks_h, dtype=weigh.dtype)
        for stack in sampled(ctx.stacks):
            q_BgLd, k_BLd, v_BLe = stack.take(query), stack.take_keys(key)[:, 0], stack.take_keys(value)[:, 0]
            do_BgLe = stack.take(grads[0].transpose(1, 2), blank=True)
            dq_BgLd = torch.empty_like(q_BgLd, memory_format=torch.contiguous_format)
            dk_BLd, dv_BLe = (torch.zeros_like(t, dtype=weigh.dtype) for t in (k_BLd, v_BLe))
            exact_q, exact_k = q_BgLd.to(weigh.dtype), k_BLd.to(weigh.dtype)
            for block in sampled(_blocks(stack.length, ctx.settings.variant.window, stack.earlier)):
                weights = weigh(exact_q, exact_k, block, slope=True)
                q_BMd, do_BMe = (t[:, :, block.queries].flatten(1, 2) for t in (q_BgLd, do_BgLe))
                dv_BLe[:, block.keys] += torch.bmm(weights.given.to(query.dtype).mT, do_BMe)
                pdp_BMN = torch.bmm(do_BMe, v_BLe[:, block.keys].mT).to(weigh.dtype).mul_(weights.given)
                flow_BM1 = pdp_BMN.sum(-1, keepdim=True)
                ds_BMN = pdp_BMN.addcmul_(weights.probabilities, flow_BM1, value=-1)
                if weights.slope is not None:
                    ds_BMN.mul_(weights.slope)
                if lost_h is not None and weights.sink is not None:
                    lost_h += (weights.sink * flow_BM1).view(-1, lost_h.numel(), q_BMd.shape[1] // q_BgLd.shape[1]).sum((0, 2))
                ds_BMN = ds_BMN.mul_(ctx.settings.scale).to(query.dtype)
                dq_BgLd[:, :, block.queries] = torch.bmm(ds_BMN, k_BLd[:, block.keys]).unflatten(1, (q_BgLd.shape[1], -1))
                dk_BLd[:, block.keys] += torch.bmm(ds_BMN.mT, q_BMd)
            stack.put(dq_BgLd, found[0])
            for made, whole in zip((dk_BLd[:, None], dv_BLe[:, None]), found[1:], strict=True):
                (stack.add_keys if several else stack.put)(made, whole)
        lost = None if sinks_h is None or lost_h is None else lost_h.neg().to(sinks_h.dtype)
        return found[0], found[1].to(key.dtype), found[2].to(value.dtype), lost, None


def _same_layout(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Room for a gradient, ``[1, h, T, d]`` seen, tokens first in memory, as projections want it."""
    return torch.empty_like(tensor.transpose(1, 2), dtype=dtype, memory_format=torch.contiguous_format).transpose(1, 2)


@dataclass(frozen=True)
class _Block:
    """Queries that are computed together.

    Attributes:
        queries: which; as many as ``rows``.
        keys: those that one of them sees; they end where the queries end.
        early: how many keys before the first one the window of the first query begins; None without a window.
    """

    queries: slice
    keys: slice
    rows: int
    early: int | None


def _blocks(length: int, window: int | None, earlier: int = 0) -> Iterator[_Block]:
    """Blocks of a segment's queries, behind whose first one are ``earlier`` keys that are not of the segment."""
    for begin in range(0, length, _BLOCK):
        end = min(begin + _BLOCK, length)
        reach = 0 if window is None else earlier + begin - window + 1
        first = max(reach, 0)
        yield _Block(slice(begin, end), slice(first, earlier + end), end - begin, None if window is None else first - reach)


@dataclass(frozen=True)
class _Weights:
    """What the queries of a block give to their keys.

    Attributes:
        probabilities: ``[B, M, N]``.
        given: the same after dropout.
        slope: derivative of the bounded scores; None without a bound, or not asked for.
        sink: ``[B, M, 1]``, probability of the sink; None without one.
    """

    probabilities: torch.Tensor
    given: torch.Tensor
    slope: torch.Tensor | None
    sink: torch.Tensor | None


class _Weigher:
    """Makes the weights of blocks. What is drawn is drawn in the order of the calls."""

    def __init__(self, query: torch.Tensor, sinks_h: torch.Tensor | None, settings: _Settings) -> None:
        self.dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        self._settings, self._sinks_h = settings, sinks_h
        minus = torch.full((_BLOCK, _BLOCK), -math.inf, dtype=self.dtype, device=query.device)
        self._later, self._earlier = minus.triu(1), minus.tril(-1)
        if settings.variant.dropout:
            self._draw = torch.Generator(query.device).manual_seed(settings.seed)

    def __call__(self, q_BgLd: torch.Tensor, k_BLd: torch.Tensor, block: _Block, slope: bool = False) -> _Weights:
        variant, rows = self._settings.variant, block.rows
        batch, heads = q_BgLd.shape[:2]
        scores_BMN = torch.bmm(q_BgLd[:, :, block.queries].flatten(1, 2), k_BLd[:, block.keys].mT).mul_(self._settings.scale)
        slope_BMN = None
        if variant.cap is not None:
            scores_BMN.div_(variant.cap).tanh_()
            slope_BMN = 1 - scores_BMN.square() if slope else None
            scores_BMN.mul_(variant.cap)
        scores_BgmN = scores_BMN.view(batch, heads, rows, -1)
        scores_BgmN[..., -rows:].add_(self._later[:rows, :rows])
        if block.early is not None and block.early < rows - 1:
            scores_BgmN[..., : rows - block.early].add_(self._earlier[:rows, block.early : rows])
        sink = None
        if self._sinks_h is None:
            probabilities = torch.softmax(scores_BMN, dim=-1)
        else:
            sinks_BM1 = self._sinks_h.to(self.dtype).view(-1, heads, 1, 1).expand(-1, -1, rows, 1).flatten(1, 2)
            sinks_BM1 = sinks_BM1.repeat(batch // len(sinks_BM1), 1, 1)
            every = torch.softmax(torch.cat([scores_BMN, sinks_BM1], dim=-1), dim=-1)
            probabilities, sink = every[..., :-1], every[..., -1:]
        if not variant.dropout:
            return _Weights(probabilities, probabilities, slope_BMN, sink)
        kept = torch.empty_like(probabilities).bernoulli_(1 - variant.dropout, generator=self._draw)
        return _Weights(probabilities, kept.div_(1 - variant.dropout).mul_(probabilities), slope_BMN, sink)

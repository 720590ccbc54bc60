"""Causal attention within segments on a CPU, as blocks of matrix products, with a backward pass of its own.

PyTorch's CPU attention is slow backwards (in bf16 four times as slow as this at 170 tokens, one and a half times at 1,024), and
forwards too where the processor has no tiles for bf16. Here queries are taken in blocks; a block looks at the keys up to its
own end, so that little of what a mask would throw away is computed, and its scores stay in the cache. Query heads that share a
key head are rows of one product, so keys are never repeated. Scores and probabilities are float32; only ``q``, ``k`` and ``v``
are kept for the backward pass, which makes the probabilities anew:
``dV = P^T dO``, ``dP = dO V^T``, ``dS = P (dP - rowsum(P dP))``, ``dQ = s dS K``, ``dK = s dS^T Q``.

``N`` tokens, ``h`` query heads, ``k`` key heads, ``g`` = h / k, ``d`` width of a head, ``m`` queries of a block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

_BLOCK = 64
"""Queries of a block. Of 32, 64, 128, 256 the fastest at 64 to 1,024 tokens (9 query heads on 3 key heads of 64)."""

_TILES = torch.cpu._is_amx_tile_supported()
"""Whether the library's forward pass in bf16 is the faster one."""


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, edges: Sequence[int], scale: float) -> torch.Tensor:
    """Causal attention of each segment to itself.

    Args:
        query: ``[1, h, T, d]``.
        key: ``[1, k, T, d]``, ``h`` a multiple of ``k``.
        value: like ``key``.
        edges: boundaries of the segments, ``0, l1, l1 + l2, ..., T``.
        scale: factor of the scores.

    Returns:
        ``[1, T, h, d]``, contiguous, in the dtype that autocast says, else that of the query.
    """
    assert query.shape[1] % key.shape[1] == 0 and key.shape == value.shape, (query.shape, key.shape, value.shape)
    if torch.is_autocast_enabled(query.device.type):  # as for the library's attention; rotated queries and keys may be float32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    out: torch.Tensor = _Attention.apply(query, key, value, edges, scale)
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, edges: Sequence[int], scale: float
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.edges, ctx.scale = edges, scale
        _, heads, total, width = query.shape
        groups = key.shape[1]
        out = query.new_empty(1, total, heads, width)
        mask = _causal(query)
        for begin, end in pairwise(edges):
            if _TILES and query.dtype == torch.bfloat16:
                q, k, v = (tensor[:, :, begin:end] for tensor in (query, key, value))
                made = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=heads != groups)
                out[:, begin:end] = made.transpose(1, 2)
                continue
            q_kgNd, k_kNd, v_kNd = _grouped(query, groups, begin, end), key[0, :, begin:end], value[0, :, begin:end]
            exact_q, exact_kdN = q_kgNd.to(mask.dtype), k_kNd.to(mask.dtype).mT
            o_kgNd = _grouped(out.transpose(1, 2), groups, begin, end)
            for a, b in _blocks(end - begin):
                p_kMN = _probabilities(exact_q[:, :, a:b], exact_kdN[:, :, :b], scale, mask)
                o_kgNd[:, :, a:b] = torch.bmm(p_kMN.to(value.dtype), v_kNd[:, :b]).view(groups, -1, b - a, width)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        groups, width = key.shape[1], key.shape[3]
        dtype, mask = query.dtype, _causal(query)
        grad = grads[0].transpose(1, 2)
        found = [_same_layout(tensor) for tensor in (query, key, value)]
        for begin, end in pairwise(ctx.edges):
            q_kgNd, k_kNd, v_kdN = _grouped(query, groups, begin, end), key[0, :, begin:end], value[0, :, begin:end].mT
            exact_q, exact_kdN = q_kgNd.to(mask.dtype), k_kNd.to(mask.dtype).mT
            do_kgNd, dq_kgNd = _grouped(grad, groups, begin, end), _grouped(found[0], groups, begin, end)
            dk_kNd, dv_kNd = (torch.zeros_like(k_kNd, dtype=mask.dtype) for _ in range(2))
            for a, b in _blocks(end - begin):
                p_kMN = _probabilities(exact_q[:, :, a:b], exact_kdN[:, :, :b], ctx.scale, mask)
                q_kMd, do_kMd = (t[:, :, a:b].reshape(groups, -1, width) for t in (q_kgNd, do_kgNd))
                dv_kNd[:, :b] += torch.bmm(p_kMN.to(dtype).mT, do_kMd)
                pdp_kMN = torch.bmm(do_kMd, v_kdN[:, :, :b]).to(mask.dtype).mul_(p_kMN)
                ds_kMN = pdp_kMN.addcmul_(p_kMN, pdp_kMN.sum(-1, keepdim=True), value=-1).mul_(ctx.scale).to(dtype)
                dq_kgNd[:, :, a:b] = torch.bmm(ds_kMN, k_kNd[:, :b]).view(groups, -1, b - a, width)
                dk_kNd[:, :b] += torch.bmm(ds_kMN.mT, q_kMd)
            found[1][0, :, begin:end], found[2][0, :, begin:end] = dk_kNd, dv_kNd
        return (*found, None, None)


def _blocks(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + _BLOCK, length)) for start in range(0, length, _BLOCK)]


def _grouped(tensor: torch.Tensor, groups: int, begin: int, end: int) -> torch.Tensor:
    """``[1, h, T, d]`` -> a view ``[k, g, N, d]`` of a segment."""
    return tensor[0, :, begin:end].unflatten(0, (groups, -1))


def _same_layout(tensor: torch.Tensor) -> torch.Tensor:
    """Room for a gradient, ``[1, h, T, d]`` seen, tokens first in memory, as projections want it."""
    return torch.empty_like(tensor.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def _causal(like: torch.Tensor) -> torch.Tensor:
    """What is added to the scores of a block with itself."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.full((_BLOCK, _BLOCK), -math.inf, dtype=dtype, device=like.device).triu_(1)


def _probabilities(q_kgmd: torch.Tensor, k_kdN: torch.Tensor, scale: float, mask: torch.Tensor) -> torch.Tensor:
    """``[k, g m, N]`` of a block of queries that ends where the keys end."""
    groups, _, rows, width = q_kgmd.shape
    scores_kMN = torch.bmm(q_kgmd.reshape(groups, -1, width), k_kdN).mul_(scale)
    scores_kMN.view(groups, -1, rows, k_kdN.shape[2])[..., -rows:].add_(mask[:rows, :rows])
    return torch.softmax(scores_kMN, dim=-1)

"""Log-probabilities of given tokens from hidden states, without ever holding all logits.

For ``logp_t = log softmax(W h_t)[y_t]`` the gradient in ``h_t`` is ``c_t (W[y_t] - p_t W)`` with one number ``c_t`` for each
token that depends on the loss alone. So a frozen head needs no second look: ``g_t = W[y_t] - p_t W`` is made in the forward
pass, where the logits of a chunk are at hand, and the backward pass is one multiplication. A head that is trained needs ``c_t``
for its own gradient and makes the logits of a chunk anew; a head that is more than a matrix (an adapter on it) is called, and
called again when gradients are asked for, chunk by chunk.

Products are computed in the dtype that autocast says, everything behind them in float32. A chunk's logits are held in the dtype
of the products, and worked on in blocks of rows that stay in the processor's cache.

``V`` vocabulary, ``H`` width of the model, ``S`` positions, ``C`` those of a chunk, ``K`` those of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from tunesmith.sampled import sampled

_MIB = 1 << 20
_CHUNK_BYTES = {"cpu": 32 * _MIB}
"""Logits of a chunk by device. Measured for 500 positions of 49,152 tokens on one core: 24 to 48 MiB are equally fast."""
_LARGE_CHUNK_BYTES = 256 * _MIB
"""Elsewhere: enough rows for products that keep an accelerator busy."""
_BLOCK_BYTES = 1 * _MIB
"""float32 logits of a block on the CPU; whole chunks at once take 1.4 times as long."""
_FP16_SHIFT = 256.0
"""fp16 has nothing below 6e-8, and probabilities are: they are multiplied by this before a product, and divided after."""
_VOCABULARY_BLOCK = 4096
"""Rows of the head whose gradient is made at a time: the product is still in the cache when it is added."""

Head = Callable[[torch.Tensor], torch.Tensor]
"""Hidden states ``[C, H]`` -> logits ``[C, V]``, before scale and cap."""


def token_logprobs(
    hidden_SH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_S: torch.Tensor,
    bias_V: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """``log softmax(cap(scale (W h + b)))[target]`` in float32, with ``cap(z) = softcap tanh(z / softcap)``.

    Gradients go to the hidden states, and to weight and bias if these are trained.

    Args:
        hidden_SH: float ``[S, H]``.
        weight_VH: of the output head, ``[V, H]``.
        targets_S: int64 ``[S]``.
        bias_V: of the output head.
        scale: factor of the logits.
        softcap: bound of the logits (Gemma 2, arXiv 2408.00118, section 2); None: no bound.

    Returns:
        float32 ``[S]``.

    Example:
        ``h = [[1]]``, ``W = [[0], [ln 3]]``, ``target = [0]``: logits ``[0, ln 3]``, so ``-ln 4 = -1.3863``; the gradient in
        ``h`` is ``W[0] - (W[0] + 3 W[1]) / 4 = -0.75 ln 3 = -0.8240``.
    """
    assert hidden_SH.ndim == 2 and weight_VH.ndim == 2, (hidden_SH.shape, weight_VH.shape)
    assert targets_S.shape == hidden_SH.shape[:1], (targets_S.shape, hidden_SH.shape)
    dtype = _product_dtype(hidden_SH)
    hidden_SH = hidden_SH.to(dtype)
    trained = torch.is_grad_enabled() and (weight_VH.requires_grad or (bias_V is not None and bias_V.requires_grad))
    function = _TrainedHead if trained else _FrozenHead
    keep = torch.is_grad_enabled() and hidden_SH.requires_grad
    logp_S: torch.Tensor = function.apply(hidden_SH, weight_VH, targets_S, bias_V, scale, softcap, keep)
    return logp_S


def token_logprobs_through(
    head: Head,
    vocabulary: int,
    hidden_SH: torch.Tensor,
    targets_S: torch.Tensor,
    scale: float = 1.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """As ``token_logprobs``, for a head that is more than one matrix; whatever it trains gets its gradients.

    Args:
        head: called with chunks of the hidden states, and once more with each in the backward pass.
        vocabulary: ``V``, by which chunks are sized.
        hidden_SH: float ``[S, H]``.
        targets_S: int64 ``[S]``.
        scale: factor of the logits.
        softcap: bound of the logits.

    Returns:
        float32 ``[S]``.
    """
    assert targets_S.shape == hidden_SH.shape[:1], (targets_S.shape, hidden_SH.shape)

    def part(hidden_CH: torch.Tensor, targets_C: torch.Tensor) -> torch.Tensor:
        logits_CV = _shape_logits(head(hidden_CH).float(), scale, softcap)
        return -torch.nn.functional.cross_entropy(logits_CV, targets_C, reduction="none")

    parts = []
    for rows in _chunks(hidden_SH, vocabulary, torch.float32):
        made = checkpoint(part, hidden_SH[rows], targets_S[rows], use_reentrant=False)
        assert isinstance(made, torch.Tensor)
        parts.append(made)
    return torch.cat(parts)


@torch.no_grad()
def score_tokens(
    head: Head,
    vocabulary: int,
    hidden_SH: torch.Tensor,
    targets_S: torch.Tensor,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """For evaluation: log-probabilities, and whether each target is what the model ranks first. Arguments as above.

    Returns:
        float32 ``[S]`` and bool ``[S]``.
    """
    logps, firsts = [], []
    for rows in _chunks(hidden_SH, vocabulary, torch.float32):
        logits_CV = _shape_logits(head(hidden_SH[rows]).float(), scale, softcap)
        firsts.append(logits_CV.argmax(-1) == targets_S[rows])
        logps.append(-torch.nn.functional.cross_entropy(logits_CV, targets_S[rows], reduction="none"))
    return torch.cat(logps), torch.cat(firsts)


def _product_dtype(tensor: torch.Tensor) -> torch.dtype:
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def _accurate(dtype: torch.dtype) -> torch.dtype:
    """The dtype of what follows a product: float32; float64 stays, for numerical checks."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _chunks(hidden_SH: torch.Tensor, vocabulary: int, dtype: torch.dtype) -> Iterator[slice]:
    size = _CHUNK_BYTES.get(hidden_SH.device.type, _LARGE_CHUNK_BYTES)
    return _slices(len(hidden_SH), max(1, size // (vocabulary * dtype.itemsize)))


def _blocks(logits_CV: torch.Tensor) -> Iterator[slice]:
    rows = max(1, _BLOCK_BYTES // (4 * logits_CV.shape[1])) if logits_CV.device.type == "cpu" else len(logits_CV)
    return _slices(len(logits_CV), rows)


def _slices(total: int, step: int) -> Iterator[slice]:
    """At least one, so that no rows give empty results and not none."""
    return (slice(start, min(start + step, total)) for start in range(0, max(1, total), step))


def _shape_logits(logits: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def _slope(shaped: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor | float:
    """Derivative of the shaped logits in what the product gave."""
    return scale if softcap is None else (1 - (shaped / softcap) ** 2) * scale


def _biased(logits: torch.Tensor, bias_V: torch.Tensor | None) -> torch.Tensor:
    logits = logits.to(_accurate(logits.dtype))
    return logits if bias_V is None else logits + bias_V


def _plus_one_at(values_KV: torch.Tensor, targets_K1: torch.Tensor) -> torch.Tensor:
    return values_KV.scatter_add_(1, targets_K1, torch.ones_like(targets_K1, dtype=values_KV.dtype))


def _gather_product(sum_VH: torch.Tensor, left_CV: torch.Tensor, right_CH: torch.Tensor, begin: bool) -> None:
    """``sum += left^T right``, or without the sum's old values where it begins."""
    for rows in sampled(_slices(len(sum_VH), _VOCABULARY_BLOCK)):
        part = left_CV[:, rows].t() @ right_CH
        sum_VH[rows].copy_(part) if begin else sum_VH[rows].add_(part)


class _FrozenHead(torch.autograd.Function):
    """Gradients to the hidden states alone; they are made in the forward pass, in two products for each chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_SH: torch.Tensor,
        weight_VH: torch.Tensor,
        targets_S: torch.Tensor,
        bias_V: torch.Tensor | None,
        scale: float,
        softcap: float | None,
        keep: bool,
    ) -> torch.Tensor:
        weight_VH = weight_VH.to(hidden_SH.dtype)
        shift = _FP16_SHIFT if hidden_SH.dtype == torch.float16 else 1.0
        logp_S = torch.empty(len(hidden_SH), dtype=_accurate(hidden_SH.dtype), device=hidden_SH.device)
        g_SH = torch.empty_like(hidden_SH) if keep else None
        for rows in sampled(_chunks(hidden_SH, len(weight_VH), hidden_SH.dtype)):
            logits_CV = hidden_SH[rows] @ weight_VH.t()
            targets_C, logp_C = targets_S[rows], logp_S[rows]
            for block in sampled(_blocks(logits_CV)):
                shaped_KV = _shape_logits(_biased(logits_CV[block], bias_V), scale, softcap)
                all_KV = torch.log_softmax(shaped_KV, dim=-1)
                target_K1 = targets_C[block, None]
                logp_C[block] = all_KV.gather(1, target_K1)[:, 0]
                if g_SH is not None:
                    residual_KV = _plus_one_at(all_KV.exp_().neg_(), target_K1)
                    logits_CV[block] = residual_KV.mul_(_slope(shaped_KV, scale, softcap)).mul_(shift)
            if g_SH is not None:
                torch.mm(logits_CV, weight_VH, out=g_SH[rows])
        if g_SH is not None:
            ctx.save_for_backward(g_SH)
        ctx.shift = shift
        return logp_S

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (c_S,) = grads
        (g_SH,) = ctx.saved_tensors
        return (g_SH * (c_S / ctx.shift)[:, None]).to(g_SH.dtype), None, None, None, None, None, None


class _TrainedHead(torch.autograd.Function):
    """Gradients to hidden states, weight and bias; the logits of a chunk are made twice and never kept."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_SH: torch.Tensor,
        weight_VH: torch.Tensor,
        targets_S: torch.Tensor,
        bias_V: torch.Tensor | None,
        scale: float,
        softcap: float | None,
        keep: bool,
    ) -> torch.Tensor:
        product_VH = weight_VH.to(hidden_SH.dtype)
        ctx.save_for_backward(hidden_SH, product_VH, targets_S, bias_V)
        ctx.dtype, ctx.shape = weight_VH.dtype, (scale, softcap)
        return _FrozenHead.forward(ctx, hidden_SH, product_VH, targets_S, bias_V, scale, softcap, False)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (c_S,) = grads
        hidden_SH, product_VH, targets_S, bias_V = ctx.saved_tensors
        scale, softcap = ctx.shape
        need_hidden, need_weight, _, need_bias, *_ = ctx.needs_input_grad
        grad_SH = torch.empty_like(hidden_SH) if need_hidden else None
        grad_VH = torch.empty_like(product_VH, dtype=ctx.dtype) if need_weight else None
        grad_V = torch.zeros_like(bias_V) if need_bias else None
        for rows in sampled(_chunks(hidden_SH, len(product_VH), hidden_SH.dtype)):
            logits_CV = hidden_SH[rows] @ product_VH.t()
            targets_C, c_C = targets_S[rows], c_S[rows]
            for block in sampled(_blocks(logits_CV)):
                shaped_KV = _shape_logits(_biased(logits_CV[block], bias_V), scale, softcap)
                residual_KV = _plus_one_at(torch.softmax(shaped_KV, dim=-1).neg_(), targets_C[block, None])
                residual_KV.mul_(_slope(shaped_KV, scale, softcap)).mul_(c_C[block, None])
                if grad_V is not None:
                    grad_V += residual_KV.sum(0)
                logits_CV[block] = residual_KV
            if grad_SH is not None:
                torch.mm(logits_CV, product_VH, out=grad_SH[rows])
            if grad_VH is not None:
                _gather_product(grad_VH, logits_CV, hidden_SH[rows], begin=rows.start == 0)
        return grad_SH, grad_VH, None, grad_V, None, None, None

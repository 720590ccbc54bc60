"""Log-probabilities of given tokens from hidden states, without ever holding all logits.

For ``logp_t = log softmax(W h_t)[y_t]`` the gradient in ``h_t`` is ``c_t (W[y_t] - p_t W)`` with one number ``c_t`` for each
token that depends on the loss alone. So a frozen head needs no second look: ``g_t = W[y_t] - p_t W`` is made in the forward
pass, where the logits of a chunk are at hand, and the backward pass is one multiplication. A head that is trained needs ``c_t``
for its own gradient and makes the logits of a chunk anew; a head that is more than a matrix (an adapter on it) is called, and
called again when gradients are asked for, chunk by chunk.

Entropies ``H_t = -sum p_t log p_t`` come from the same logits. Their gradient ``dH/dz = -p (log p + H)`` is another vector for
each token, so a frozen head makes a third product where it is asked for; a trained one adds it to what it multiplies anyway.

Products are computed in the dtype that autocast says, everything behind them in float32. A chunk's logits are held in the dtype
of the products, and worked on in blocks of rows that stay in the processor's cache.

``V`` vocabulary, ``H`` width of the model, ``S`` positions, ``C`` those of a chunk, ``K`` those of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from tunesmith.losses.cross_entropy import entropy_of_logps
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
    logp_S, _ = _through_matrix(hidden_SH, weight_VH, targets_S, bias_V, scale, softcap, None)
    return logp_S


def token_logprobs_and_entropy(
    hidden_SH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_S: torch.Tensor,
    bias_V: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    entropy_grad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``token_logprobs``, and the entropy of what could have stood in each target's place, in nats.

    Logits divided by a temperature are those of ``scale / temperature`` and ``softcap / temperature``.

    Args:
        hidden_SH: float ``[S, H]``.
        weight_VH: of the output head, ``[V, H]``.
        targets_S: int64 ``[S]``.
        bias_V: of the output head.
        scale: factor of the logits.
        softcap: bound of the logits.
        entropy_grad: whether entropies have gradients; without, they cost no product.

    Returns:
        float32 ``[S]`` and float32 ``[S]``, the entropies, not negative.

    Example:
        Logits ``[0, ln 3]``: probabilities 1/4 and 3/4, entropy ``ln 4 - 0.75 ln 3 = 0.5623``; the gradient in the logits is
        ``-1/4 (-1.3863 + 0.5623) = 0.2060`` and -0.2060.
    """
    logp_S, entropy_S = _through_matrix(hidden_SH, weight_VH, targets_S, bias_V, scale, softcap, entropy_grad)
    assert entropy_S is not None
    return logp_S, entropy_S


def _through_matrix(
    hidden_SH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_S: torch.Tensor,
    bias_V: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    entropy_grad: bool | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probabilities and entropies; no entropies where ``entropy_grad`` is None."""
    assert hidden_SH.ndim == 2 and weight_VH.ndim == 2, (hidden_SH.shape, weight_VH.shape)
    assert targets_S.shape == hidden_SH.shape[:1], (targets_S.shape, hidden_SH.shape)
    dtype = _product_dtype(hidden_SH)
    hidden_SH = hidden_SH.to(dtype)
    trained = torch.is_grad_enabled() and (weight_VH.requires_grad or (bias_V is not None and bias_V.requires_grad))
    function = _TrainedHead if trained else _FrozenHead
    keep = torch.is_grad_enabled() and hidden_SH.requires_grad
    found: tuple[torch.Tensor, torch.Tensor | None] = function.apply(
        hidden_SH, weight_VH, targets_S, bias_V, scale, softcap, keep, entropy_grad
    )
    return found


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
    return torch.cat([logp_C for logp_C, _ in _called(head, vocabulary, hidden_SH, targets_S, scale, softcap, None)])


def token_logprobs_and_entropy_through(
    head: Head,
    vocabulary: int,
    hidden_SH: torch.Tensor,
    targets_S: torch.Tensor,
    scale: float = 1.0,
    softcap: float | None = None,
    entropy_grad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``token_logprobs_and_entropy``, for a head that is more than one matrix. Arguments as above."""
    logps, entropies = zip(*_called(head, vocabulary, hidden_SH, targets_S, scale, softcap, entropy_grad), strict=True)
    return torch.cat(logps), torch.cat(entropies)


def _called(
    head: Head,
    vocabulary: int,
    hidden_SH: torch.Tensor,
    targets_S: torch.Tensor,
    scale: float,
    softcap: float | None,
    entropy_grad: bool | None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Log-probabilities and entropies of chunk after chunk; no entropies where ``entropy_grad`` is None."""
    assert targets_S.shape == hidden_SH.shape[:1], (targets_S.shape, hidden_SH.shape)

    def part(hidden_CH: torch.Tensor, targets_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        logits_CV = _shape_logits(head(hidden_CH).float(), scale, softcap)
        if entropy_grad is None:
            return -torch.nn.functional.cross_entropy(logits_CV, targets_C, reduction="none"), None
        all_CV = torch.log_softmax(logits_CV, dim=-1)
        return all_CV.gather(1, targets_C[:, None])[:, 0], entropy_of_logps(all_CV if entropy_grad else all_CV.detach())

    for rows in _chunks(hidden_SH, vocabulary, torch.float32):
        made: Any = checkpoint(part, hidden_SH[rows], targets_S[rows], use_reentrant=False)
        yield made


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


def _entropy_slope(all_KV: torch.Tensor, entropy_K: torch.Tensor) -> torch.Tensor:
    """Derivative of the entropy in the shaped logits, ``-p (log p + H)``."""
    away_KV = (all_KV + entropy_K[:, None]).clamp_(min=torch.finfo(all_KV.dtype).min)  # a token of probability 0 is no NaN
    return away_KV.mul_(all_KV.exp()).neg_()


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
        entropy_grad: bool | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight_VH = weight_VH.to(hidden_SH.dtype)
        shift = _FP16_SHIFT if hidden_SH.dtype == torch.float16 else 1.0
        logp_S = torch.empty(len(hidden_SH), dtype=_accurate(hidden_SH.dtype), device=hidden_SH.device)
        entropy_S = None if entropy_grad is None else torch.empty_like(logp_S)
        g_SH = torch.empty_like(hidden_SH) if keep else None
        e_SH = torch.empty_like(hidden_SH) if keep and entropy_grad else None
        for rows in sampled(_chunks(hidden_SH, len(weight_VH), hidden_SH.dtype)):
            logits_CV = hidden_SH[rows] @ weight_VH.t()
            fall_CV = None if e_SH is None else torch.empty_like(logits_CV)
            targets_C, logp_C = targets_S[rows], logp_S[rows]
            entropy_C = None if entropy_S is None else entropy_S[rows]
            for block in sampled(_blocks(logits_CV)):
                shaped_KV = _shape_logits(_biased(logits_CV[block], bias_V), scale, softcap)
                all_KV = torch.log_softmax(shaped_KV, dim=-1)
                target_K1 = targets_C[block, None]
                logp_C[block] = all_KV.gather(1, target_K1)[:, 0]
                if entropy_C is not None:
                    entropy_C[block] = entropy_of_logps(all_KV)
                    if fall_CV is not None:
                        slope = _slope(shaped_KV, scale, softcap)
                        fall_CV[block] = _entropy_slope(all_KV, entropy_C[block]).mul_(slope).mul_(shift)
                if g_SH is not None:
                    residual_KV = _plus_one_at(all_KV.exp_().neg_(), target_K1)
                    logits_CV[block] = residual_KV.mul_(_slope(shaped_KV, scale, softcap)).mul_(shift)
            if g_SH is not None:
                torch.mm(logits_CV, weight_VH, out=g_SH[rows])
            if e_SH is not None and fall_CV is not None:
                torch.mm(fall_CV, weight_VH, out=e_SH[rows])
        if g_SH is not None:
            ctx.save_for_backward(*(made_SH for made_SH in (g_SH, e_SH) if made_SH is not None))
        if entropy_S is not None and not entropy_grad:
            ctx.mark_non_differentiable(entropy_S)
        ctx.shift = shift
        return logp_S, entropy_S

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        g_SH, *more = ctx.saved_tensors
        grad_SH = g_SH * (grads[0] / ctx.shift)[:, None]
        for e_SH in more:
            grad_SH = grad_SH + e_SH * (grads[1] / ctx.shift)[:, None]
        return grad_SH.to(g_SH.dtype), None, None, None, None, None, None, None


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
        entropy_grad: bool | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        product_VH = weight_VH.to(hidden_SH.dtype)
        ctx.save_for_backward(hidden_SH, product_VH, targets_S, bias_V)
        ctx.dtype, ctx.shape, ctx.entropy_grad = weight_VH.dtype, (scale, softcap), entropy_grad
        return _FrozenHead.forward(ctx, hidden_SH, product_VH, targets_S, bias_V, scale, softcap, False, entropy_grad)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        c_S, d_S = grads  # the second of entropies; None or zeros where they have no gradient
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
                if ctx.entropy_grad:
                    all_KV = torch.log_softmax(shaped_KV, dim=-1)
                    fall_KV = _entropy_slope(all_KV, entropy_of_logps(all_KV)).mul_(_slope(shaped_KV, scale, softcap))
                    residual_KV += fall_KV.mul_(d_S[rows][block, None])
                if grad_V is not None:
                    grad_V += residual_KV.sum(0)
                logits_CV[block] = residual_KV
            if grad_SH is not None:
                torch.mm(logits_CV, product_VH, out=grad_SH[rows])
            if grad_VH is not None:
                _gather_product(grad_VH, logits_CV, hidden_SH[rows], begin=rows.start == 0)
        return grad_SH, grad_VH, None, grad_V, None, None, None, None

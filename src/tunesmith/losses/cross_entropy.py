"""Negative log-likelihood of tokens, and entropy of what could have stood in their place."""

from __future__ import annotations

import torch


def token_nll(logits_SV: torch.Tensor, targets_S: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each target, ``-log softmax(logits)[target]``, in float32.

    Args:
        logits_SV: float ``[S, V]``.
        targets_S: int64 ``[S]``.

    Returns:
        float32 ``[S]``, unreduced.

    Example:
        ``logits = [[0, 0]]``, ``target = [1]`` -> ``[ln 2] = [0.6931]``.
    """
    assert logits_SV.ndim == 2, logits_SV.shape
    assert targets_S.shape == logits_SV.shape[:1], (targets_S.shape, logits_SV.shape)
    return torch.nn.functional.cross_entropy(logits_SV.float(), targets_S, reduction="none")


def entropy_of_logps(all_SV: torch.Tensor) -> torch.Tensor:
    """``-sum p log p``, in nats.

    Args:
        all_SV: log-probabilities of a whole vocabulary, ``[S, V]``, in float32 or wider; those of 0 may be infinite.

    Returns:
        float ``[S]``, not negative.

    Example:
        ``log [1/4, 3/4]``: ``0.25 * 1.3863 + 0.75 * 0.2877 = 0.5623``.
    """
    return -torch.linalg.vecdot(all_SV.exp(), all_SV.clamp(min=torch.finfo(all_SV.dtype).min))

"""The loss of feedback: single answers, each found good or bad."""

from __future__ import annotations

import torch


def kto_loss(ratio_P: torch.Tensor, desirable_P: torch.Tensor, point: torch.Tensor, beta: float) -> torch.Tensor:
    """Kahneman-Tversky optimisation (arXiv 2402.01306), without the classes' weights.

    ``1 - sigmoid(beta (r - z))`` of a good answer and ``1 - sigmoid(beta (z - r))`` of a bad one, with ``r`` its log-ratio of
    model to reference and ``z`` the reference point. With ``z = 0`` it is APO-zero on single answers (arXiv 2408.06266, eq. 7).

    Args:
        ratio_P: log-ratio of each answer, summed over its tokens, ``[P]``.
        desirable_P: whether it is good, bool ``[P]``.
        point: how far the model is from the reference, a scalar; no gradient flows through it.
        beta: strength.

    Returns:
        float32 ``[P]``, unreduced.

    Example:
        ``r = 1, z = 0.5, beta = 0.5``: good ``1 - sigmoid(0.25) = 0.4378``, bad ``1 - sigmoid(-0.25) = 0.5622``.
    """
    assert ratio_P.ndim == 1 and ratio_P.shape == desirable_P.shape, (ratio_P.shape, desirable_P.shape)
    gain_P = beta * (ratio_P.float() - point.detach())
    return 1 - torch.sigmoid(torch.where(desirable_P, gain_P, -gain_P))


def reference_point(ratio_P: torch.Tensor) -> torch.Tensor:
    """How far the model is from its reference: the mean log-ratio of mismatched answers, not below 0 (arXiv 2402.01306).

    Args:
        ratio_P: log-ratios of answers to other prompts, ``[P]``.

    Example:
        ``[2, -1]`` -> 0.5; ``[1, -3]`` -> 0.
    """
    return ratio_P.detach().float().mean().clamp(min=0)

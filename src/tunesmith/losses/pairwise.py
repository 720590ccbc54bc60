"""The loss of reward models."""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid


def pairwise_loss(
    chosen_P: torch.Tensor, rejected_P: torch.Tensor, centering: float = 0.0, margins_P: torch.Tensor | None = None
) -> torch.Tensor:
    """Bradley-Terry: ``-log sigmoid(r_chosen - r_rejected)`` (arXiv 2203.02155, eq. 1), in float32.

    With margins ``m``, ``-log sigmoid(r_chosen - r_rejected - m)``: what is much better is to score much higher (arXiv
    2307.09288, eq. 2). With ``centering``, ``centering (r_chosen + r_rejected)^2`` is added, which keeps rewards around 0
    without a reference (arXiv 2312.09244, eq. 3).

    Args:
        chosen_P: reward of each better answer, ``[P]``.
        rejected_P: of each worse one, ``[P]``.
        centering: factor of the second term.
        margins_P: by how much each better answer is better; None: 0.

    Returns:
        float32 ``[P]``, unreduced.

    Example:
        Rewards 1 and 0: ``-log sigmoid(1) = 0.3133``; with ``centering = 0.01``: ``0.3233``; with a margin of 1:
        ``-log sigmoid(0) = 0.6931``.
    """
    assert chosen_P.ndim == 1 and chosen_P.shape == rejected_P.shape, (chosen_P.shape, rejected_P.shape)
    chosen_P, rejected_P = chosen_P.float(), rejected_P.float()
    gap_P = chosen_P - rejected_P if margins_P is None else chosen_P - rejected_P - margins_P
    return -logsigmoid(gap_P) + centering * (chosen_P + rejected_P) ** 2

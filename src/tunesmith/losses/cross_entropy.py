"""Next-token targets and their negative log-likelihood."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tunesmith.types import IGNORE_INDEX


def next_token_targets(labels_T: torch.Tensor, lengths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The one place where labels are shifted.

    Position ``t`` predicts token ``t + 1`` of the same row; the last position of a row predicts nothing, so no row
    is ever predicted from its neighbour.

    Args:
        labels_T: int64 ``[T]``, aligned with the inputs; ``IGNORE_INDEX`` where unsupervised.
        lengths: tokens of each row; sums to ``T``.

    Returns:
        ``positions_S`` (where logits are needed) and ``targets_S`` (the tokens to predict there).

    Example:
        ``labels = [-100, 7, 8 | -100, 9]``, ``lengths = (3, 2)`` -> positions ``[0, 1, 3]``, targets ``[7, 8, 9]``.
    """
    assert labels_T.ndim == 1, labels_T.shape
    assert sum(lengths) == labels_T.numel(), (tuple(lengths), labels_T.shape)
    targets_T = torch.roll(labels_T, -1)
    lasts = torch.tensor(lengths, device=labels_T.device).cumsum(0) - 1
    targets_T[lasts] = IGNORE_INDEX
    positions_S = (targets_T != IGNORE_INDEX).nonzero().squeeze(-1)
    return positions_S, targets_T[positions_S]


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

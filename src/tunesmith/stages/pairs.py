"""Log-probabilities of the answers of pairs, from a flat batch."""

from __future__ import annotations

import torch

from tunesmith.data.collator import target_rows
from tunesmith.types import Batch


def answer_logps(batch: Batch, logp_S: torch.Tensor, ld_alpha: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the log-probabilities of each row's answer.

    With ``ld_alpha`` the tokens by which one answer of a pair is longer than the other count for that share only (LD-DPO,
    arXiv 2409.06411, eq. 9), so that length is not learned in place of preference.

    Args:
        batch: of ``P`` pairs: better answers first, then the others.
        logp_S: log-probability of each target.
        ld_alpha: share; None: every token counts.

    Returns:
        (sums, tokens), float32 ``[2P]`` each, in the order of the rows.

    Example:
        Answers of 1 and 2 tokens, ``logp = [-1 | -2, -3]``, ``ld_alpha = 0.5`` -> sums ``[-1, -3.5]``, tokens ``[1, 2]``.
    """
    rows, row_S = len(batch.lengths), target_rows(batch)
    tokens_R = torch.zeros(rows, device=logp_S.device).index_add(0, row_S, torch.ones_like(logp_S))
    if ld_alpha is not None:
        shorter_P = torch.minimum(*tokens_R.chunk(2))
        first_R = tokens_R.cumsum(0) - tokens_R  # targets of a row follow each other
        place_S = torch.arange(len(row_S), device=logp_S.device) - first_R[row_S]
        logp_S = torch.where(place_S < torch.cat([shorter_P, shorter_P])[row_S], logp_S, ld_alpha * logp_S)
    return torch.zeros(rows, device=logp_S.device).index_add(0, row_S, logp_S), tokens_R

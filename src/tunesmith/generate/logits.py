"""Scores that are no numbers, repaired where they are, so that one of them neither stops an answer nor changes others."""

from __future__ import annotations

import logging

import torch
from transformers import LogitsProcessor, LogitsProcessorList

log = logging.getLogger(__name__)


def repair(scores_BV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores from which can be sampled.

    A row is damaged if it has NaN or plus infinity, or nothing but minus infinity, which otherwise says that a token must not
    come. NaN becomes minus infinity, plus infinity the highest finite score of the row; in a row without any, the damaged
    entries become 0, so that one of them is drawn. Everything else stays as it was.

    Args:
        scores_BV: of any floating dtype; not changed.

    Returns:
        The scores, the same tensor if no row is damaged, and bool ``[B]``, which rows are.
    """
    damaged_B = ~scores_BV.amax(-1).isfinite()  # of NaN and anything the maximum is NaN
    if not damaged_B.any():
        return scores_BV, damaged_B
    rows_DV = scores_BV[damaged_B]
    finite_DV = rows_DV.isfinite()
    highest_D1 = rows_DV.masked_fill(~finite_DV, -torch.inf).amax(-1, keepdim=True)
    sound_D1 = finite_DV.any(-1, keepdim=True)
    damage_DV = rows_DV.isnan() | rows_DV.isposinf()
    damage_DV |= ~damage_DV.any(-1, keepdim=True)  # nothing but minus infinity: all of it
    instead_DV = torch.where(rows_DV.isposinf(), highest_D1, -torch.inf)
    instead_DV = torch.where(sound_D1, instead_DV, 0.0)
    repaired_BV = scores_BV.clone()
    repaired_BV[damaged_B] = torch.where(damage_DV, instead_DV.to(rows_DV.dtype), rows_DV)
    return repaired_BV, damaged_B


def say_repaired() -> None:
    """Say in the log that there was something to repair."""
    log.warning(
        "the model gave scores that are no numbers (NaN or infinite); the rows that had them were repaired, and answers go on. "
        "Weights or precision are damaged: try compute_dtype: fp32, or an earlier checkpoint"
    )


class InvalidScoreLogitsProcessor(LogitsProcessor):
    """For ``generate`` of transformers: repairs scores that are no numbers, in the rows that have any (see ``repair``).

    The first time is said in the log.

    Attributes:
        repaired: rows repaired so far, counted in each step.
    """

    def __init__(self) -> None:
        self.repaired = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores ``[B, V]`` for tokens ``[B, L]``."""
        found, damaged_B = repair(scores)
        if found is not scores:
            if not self.repaired:
                say_repaired()
            self.repaired += int(damaged_B.sum())
        return found


def get_logits_processor() -> LogitsProcessorList:
    """What ``logits_processor`` of ``generate`` is given so that invalid scores do not stop it."""
    return LogitsProcessorList([InvalidScoreLogitsProcessor()])

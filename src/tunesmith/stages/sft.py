"""Supervised fine-tuning: learn the assistant's turns of dialogues."""

from __future__ import annotations

import torch

from tunesmith.losses.cross_entropy import next_token_targets, token_nll
from tunesmith.model.precision import autocast
from tunesmith.train.trainer import PeftTrainer
from tunesmith.types import Batch, LossOutput


class Seq2SeqPeftTrainer(PeftTrainer):
    """Cross entropy on supervised tokens."""

    def compute_loss(self, batch: Batch) -> LossOutput:
        """Negative log-likelihood summed over the supervised tokens."""
        logits_SV, targets_S = self._logits(batch)
        return LossOutput(token_nll(logits_SV, targets_S).sum(), targets_S.numel())

    def prediction_step(self, batch: Batch) -> LossOutput:
        """The loss, and how many supervised tokens the model ranks first."""
        logits_SV, targets_S = self._logits(batch)
        hits = int((logits_SV.argmax(-1) == targets_S).sum())
        count = targets_S.numel()
        return LossOutput(token_nll(logits_SV, targets_S).sum(), count, {"accuracy": (hits, count)})

    def _logits(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        positions_S, targets_S = next_token_targets(batch.labels_T, batch.lengths)
        with autocast(self.given.device, self.given.compute_dtype):
            return self.given.forward.logits(batch, positions_S), targets_S

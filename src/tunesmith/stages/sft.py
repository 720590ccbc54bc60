"""Supervised fine-tuning: learn the assistant's turns of dialogues."""

from __future__ import annotations

import torch

from tunesmith.losses.cross_entropy import token_nll
from tunesmith.model.precision import autocast
from tunesmith.train.trainer import PeftTrainer
from tunesmith.types import Batch, LossOutput


class Seq2SeqPeftTrainer(PeftTrainer):
    """Cross entropy on supervised tokens."""

    def compute_loss(self, batch: Batch) -> LossOutput:
        """Weighted negative log-likelihood, summed over the supervised tokens."""
        return self._loss(self._logits(batch), batch)

    def prediction_step(self, batch: Batch) -> LossOutput:
        """The loss, and how many supervised tokens the model ranks first."""
        logits_SV = self._logits(batch)
        hits = int((logits_SV.argmax(-1) == batch.targets_S).sum())
        loss = self._loss(logits_SV, batch)
        return LossOutput(loss.sum, loss.count, {"accuracy": (hits, batch.num_targets)})

    @staticmethod
    def _loss(logits_SV: torch.Tensor, batch: Batch) -> LossOutput:
        nll_S = token_nll(logits_SV, batch.targets_S)
        if batch.weights_S is not None:
            nll_S = nll_S * batch.weights_S
        return LossOutput(nll_S.sum(), batch.total_weight)

    def _logits(self, batch: Batch) -> torch.Tensor:
        with autocast(self.given.device, self.given.compute_dtype):
            return self.given.forward.logits(batch)

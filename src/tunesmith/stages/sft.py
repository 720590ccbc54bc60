"""Supervised fine-tuning: learn the assistant's turns of dialogues."""

from __future__ import annotations

from tunesmith.stages.language import language_loss, language_metrics
from tunesmith.train.trainer import PeftTrainer
from tunesmith.types import Batch, LossOutput


class Seq2SeqPeftTrainer(PeftTrainer):
    """Cross entropy on supervised tokens."""

    def compute_loss(self, batch: Batch) -> LossOutput:
        """Weighted negative log-likelihood, summed over the supervised tokens."""
        return language_loss(self.given, batch)

    def prediction_step(self, batch: Batch) -> LossOutput:
        """The loss, and how many supervised tokens the model ranks first."""
        return language_metrics(self.given, batch)

"""Pretraining: learn to go on from any point of plain text."""

from __future__ import annotations

import math

from tunesmith.stages.language import language_loss, language_metrics
from tunesmith.train.trainer import PeftTrainer
from tunesmith.types import Batch, LossOutput

_LARGEST_EXPONENT = 700.0


class PretrainPeftTrainer(PeftTrainer):
    """Cross entropy on every token of packed blocks; evaluation adds the perplexity."""

    def compute_loss(self, batch: Batch) -> LossOutput:
        """Negative log-likelihood, summed over the tokens."""
        return language_loss(self.given, batch)

    def prediction_step(self, batch: Batch) -> LossOutput:
        """The loss, and how many tokens the model ranks first."""
        return language_metrics(self.given, batch)

    def evaluate(self) -> dict[str, float]:
        """As for any stage, and ``eval_perplexity``, the exponential of the mean loss in nats."""
        metrics = super().evaluate()
        return {**metrics, "eval_perplexity": math.exp(min(metrics["eval_loss"], _LARGEST_EXPONENT))}

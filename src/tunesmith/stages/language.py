"""The loss that language modelling stages share: cross entropy of the next token where a batch has targets."""

from __future__ import annotations

import torch

from tunesmith.stages.scores import batch_logprobs, batch_scores
from tunesmith.train.trainer import Ingredients
from tunesmith.types import Batch, LossOutput


def language_loss(given: Ingredients, batch: Batch) -> LossOutput:
    """Weighted negative log-likelihood, summed over the supervised tokens."""
    return _loss(batch_logprobs(given, batch), batch)


def language_metrics(given: Ingredients, batch: Batch) -> LossOutput:
    """The loss, and how many supervised tokens the model ranks first."""
    logp_S, first_S = batch_scores(given, batch)
    loss = _loss(logp_S, batch)
    return LossOutput(loss.sum, loss.count, {"accuracy": (int(first_S.sum()), batch.num_targets)})


def _loss(logp_S: torch.Tensor, batch: Batch) -> LossOutput:
    nll_S = -logp_S if batch.weights_S is None else -logp_S * batch.weights_S
    return LossOutput(nll_S.sum(), batch.total_weight)

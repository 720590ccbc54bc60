"""The loss that language modelling stages share: cross entropy of the next token where a batch has targets."""

from __future__ import annotations

import torch

from tunesmith.losses.cross_entropy import token_nll
from tunesmith.model.precision import autocast
from tunesmith.train.trainer import Ingredients
from tunesmith.types import Batch, LossOutput


def language_loss(given: Ingredients, batch: Batch) -> LossOutput:
    """Weighted negative log-likelihood, summed over the supervised tokens."""
    return _loss(_logits(given, batch), batch)


def language_metrics(given: Ingredients, batch: Batch) -> LossOutput:
    """The loss, and how many supervised tokens the model ranks first."""
    logits_SV = _logits(given, batch)
    hits = int((logits_SV.argmax(-1) == batch.targets_S).sum())
    loss = _loss(logits_SV, batch)
    return LossOutput(loss.sum, loss.count, {"accuracy": (hits, batch.num_targets)})


def _loss(logits_SV: torch.Tensor, batch: Batch) -> LossOutput:
    nll_S = token_nll(logits_SV, batch.targets_S)
    if batch.weights_S is not None:
        nll_S = nll_S * batch.weights_S
    return LossOutput(nll_S.sum(), batch.total_weight)


def _logits(given: Ingredients, batch: Batch) -> torch.Tensor:
    with autocast(given.device, given.compute_dtype):
        return given.forward.logits(batch)

"""Log-probabilities of a batch's targets under a model: what every stage's loss is made of."""

from __future__ import annotations

import torch

from tunesmith.losses.cross_entropy import entropy_of_logps, token_nll
from tunesmith.losses.token_logprobs import (
    score_tokens,
    token_logprobs,
    token_logprobs_and_entropy,
    token_logprobs_and_entropy_through,
    token_logprobs_through,
)
from tunesmith.model.heads import ValueHead
from tunesmith.model.output import head_matrix, output_head
from tunesmith.model.precision import autocast
from tunesmith.train.trainer import Ingredients
from tunesmith.types import Batch


def batch_logprobs(given: Ingredients, batch: Batch) -> torch.Tensor:
    """Log-probability of each target, float32 ``[S]``.

    From hidden states at the targets' positions where it is known what the model does behind them (``model/output.py``), else
    from its logits.
    """
    forward, output = given.forward, given.output
    with autocast(given.device, given.compute_dtype):
        if output is None:
            return -token_nll(forward.logits(batch), batch.targets_S)
        hidden_SH = forward.hidden(batch, batch.positions_S)
        head = output_head(forward.model)
        matrix = head_matrix(head)
        if matrix is not None:
            weight_VH, bias_V = matrix
            return token_logprobs(hidden_SH, weight_VH, batch.targets_S, bias_V, output.scale, output.softcap)
        return token_logprobs_through(head, _vocabulary(given), hidden_SH, batch.targets_S, output.scale, output.softcap)


def policy_scores(
    given: Ingredients, batch: Batch, temperature: float, entropy_grad: bool | None = None, head: ValueHead | None = None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Of each target, its log-probability, the entropy of what could stand in its place, and its value: float32 ``[S]`` each.

    One forward pass, unless the losses of a model are computed from its logits and values are asked for. Log-probabilities are
    the same to the bit, whatever else is asked for.

    Args:
        given: the model.
        batch: with targets.
        temperature: that logits are divided by.
        entropy_grad: whether entropies have gradients; None: there need not be any.
        head: reads the values; None: no values.
    """
    forward, output = given.forward, given.output
    with autocast(given.device, given.compute_dtype):
        hidden_SH = forward.hidden(batch, batch.positions_S) if output is not None or head is not None else None
        values_S = None if head is None or hidden_SH is None else head(hidden_SH)
        if output is None or hidden_SH is None:
            all_SV = torch.log_softmax(forward.logits(batch).float() / temperature, dim=-1)
            entropy_S = entropy_of_logps(all_SV if entropy_grad else all_SV.detach())
            return all_SV.gather(1, batch.targets_S[:, None])[:, 0], entropy_S, values_S
        matrix = head_matrix(lm_head := output_head(forward.model))
        shape = output.scale / temperature, None if output.softcap is None else output.softcap / temperature
        if matrix is None:
            vocabulary, grad = _vocabulary(given), bool(entropy_grad)
            through = token_logprobs_and_entropy_through(lm_head, vocabulary, hidden_SH, batch.targets_S, *shape, grad)
            return *through, values_S
        weight_VH, bias_V = matrix
        if entropy_grad is None:
            return token_logprobs(hidden_SH, weight_VH, batch.targets_S, bias_V, *shape), None, values_S
        return *token_logprobs_and_entropy(hidden_SH, weight_VH, batch.targets_S, bias_V, *shape, entropy_grad), values_S


@torch.no_grad()
def batch_scores(given: Ingredients, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """For evaluation: as ``batch_logprobs``, and whether each target is what the model ranks first, bool ``[S]``."""
    forward, output = given.forward, given.output
    with autocast(given.device, given.compute_dtype):
        if output is None:
            logits_SV = forward.logits(batch)
            return -token_nll(logits_SV, batch.targets_S), logits_SV.argmax(-1) == batch.targets_S
        hidden_SH = forward.hidden(batch, batch.positions_S)
        head = output_head(forward.model)
        return score_tokens(head, _vocabulary(given), hidden_SH, batch.targets_S, output.scale, output.softcap)


def _vocabulary(given: Ingredients) -> int:
    return int(given.forward.model.config.get_text_config().vocab_size)

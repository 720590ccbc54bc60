"""Log-probabilities of a batch's targets under a model: what every stage's loss is made of."""

from __future__ import annotations

import torch

from tunesmith.losses.cross_entropy import token_nll
from tunesmith.losses.token_logprobs import score_tokens, token_logprobs, token_logprobs_through
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

"""Preferences learned directly: of two answers, the better one becomes more likely than under a reference."""

from __future__ import annotations

import torch

from tunesmith.config.arguments import FinetuningArguments
from tunesmith.losses.preference import PairLogps, PreferenceOptions, preference_loss
from tunesmith.stages.pairs import answer_logps
from tunesmith.stages.scores import batch_logprobs
from tunesmith.train.trainer import PeftTrainer
from tunesmith.types import Batch, LossOutput


class PreferencePeftTrainer(PeftTrainer):
    """Losses of ``losses/preference.py`` on the answers' log-probabilities."""

    def compute_loss(self, batch: Batch) -> LossOutput:
        """Loss summed over the pairs, and what people watch: implicit rewards and log-probabilities."""
        tuning = self.given.finetuning
        sums_R, tokens_R = answer_logps(batch, batch_logprobs(self.given, batch), tuning.ld_alpha)
        reference = (None, None) if batch.reference_2P is None else tuple(batch.reference_2P)
        pairs = PairLogps(*sums_R.chunk(2), *tokens_R.chunk(2), *reference)
        losses_P = preference_loss(pairs, loss_weights(tuning), options(tuning))
        return LossOutput(losses_P.sum(), batch.total_weight, _watched(pairs, tuning.pref_beta))


def loss_weights(tuning: FinetuningArguments) -> dict[str, float]:
    """Name -> weight, the chosen answer's own loss (``pref_ftx``) included."""
    weights = dict(tuning.pref_loss)
    if tuning.pref_ftx:
        weights["sft"] = weights.get("sft", 0.0) + tuning.pref_ftx
    return weights


def options(tuning: FinetuningArguments) -> PreferenceOptions:
    """Numbers of the losses."""
    return PreferenceOptions(tuning.pref_beta, tuning.dpo_label_smoothing, tuning.simpo_gamma, tuning.discopop_tau)


@torch.no_grad()
def _watched(pairs: PairLogps, beta: float) -> dict[str, tuple[float, int]]:
    """Rewards are ``beta`` times the log-ratio to the reference; without one, ``beta`` times the mean log-probability."""
    if pairs.reference_chosen is None:
        chosen, rejected = beta * pairs.chosen_mean, beta * pairs.rejected_mean
    else:
        chosen, rejected = beta * pairs.chosen_ratio, beta * pairs.rejected_ratio
    named = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).float(),
        "logps/chosen": pairs.chosen,
        "logps/rejected": pairs.rejected,
    }
    sums = torch.stack([values.sum() for values in named.values()]).tolist()
    return {name: (value, len(pairs.chosen)) for name, value in zip(named, sums, strict=True)}

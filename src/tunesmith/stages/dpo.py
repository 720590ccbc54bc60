"""Preferences learned directly: of two answers, the better one becomes more likely than under a reference."""

from __future__ import annotations

from dataclasses import replace

import torch

from tunesmith.config.arguments import FinetuningArguments
from tunesmith.config.preferences import REFERENCE_FREE_LOSSES
from tunesmith.losses.preference import PairLogps, PreferenceOptions, preference_loss
from tunesmith.stages.pairs import answer_logps
from tunesmith.stages.scores import batch_logprobs
from tunesmith.train.trainer import PeftTrainer
from tunesmith.types import Batch, LossOutput


class PreferencePeftTrainer(PeftTrainer):
    """Losses of ``losses/preference.py`` on the answers' log-probabilities."""

    def compute_loss(self, batch: Batch) -> LossOutput:
        """Loss summed over the pairs, and what people watch: implicit rewards and log-probabilities.

        ``ld_alpha`` is about log-ratios: what looks at the model alone counts every token.
        """
        tuning, weights = self.given.finetuning, loss_weights(self.given.finetuning)
        logp_S = batch_logprobs(self.given, batch)
        reference = (None, None) if batch.reference_2P is None else tuple(batch.reference_2P)
        sums_R, tokens_R = answer_logps(batch, logp_S)
        whole = against = PairLogps(*sums_R.chunk(2), *tokens_R.chunk(2), *reference)
        if tuning.ld_alpha is not None:
            chosen_P, rejected_P = answer_logps(batch, logp_S, tuning.ld_alpha)[0].chunk(2)
            against = replace(whole, chosen=chosen_P, rejected=rejected_P)
        alone = {name: weight for name, weight in weights.items() if name in REFERENCE_FREE_LOSSES}
        others = {name: weight for name, weight in weights.items() if name not in alone}
        losses_P = preference_loss(whole, alone, options(tuning)) + preference_loss(against, others, options(tuning))
        return LossOutput(losses_P.sum(), batch.total_weight, _watched(whole, against, tuning.pref_beta))


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
def _watched(whole: PairLogps, against: PairLogps, beta: float) -> dict[str, tuple[float, int]]:
    """Rewards are ``beta`` times the log-ratio to the reference; without one, ``beta`` times the mean log-probability.

    Args:
        whole: with every token of the answers.
        against: as they are compared with the reference, if there is one (see ``ld_alpha``).
        beta: strength.
    """
    if whole.reference_chosen is None:
        chosen, rejected = beta * whole.chosen_mean, beta * whole.rejected_mean
    else:
        chosen, rejected = beta * against.chosen_ratio, beta * against.rejected_ratio
    named = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).float(),
        "logps/chosen": whole.chosen,
        "logps/rejected": whole.rejected,
    }
    sums = torch.stack([values.sum() for values in named.values()]).tolist()
    return {name: (value, len(whole.chosen)) for name, value in zip(named, sums, strict=True)}

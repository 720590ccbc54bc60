"""Policies that compare answers to one prompt with each other: GRPO, DAPO, Dr. GRPO, RLOO, GSPO. There are no values.

GRPO: arXiv 2402.03300; DAPO: 2503.14476; Dr. GRPO: 2503.20783; RLOO: 2402.14740; GSPO: 2507.18071.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from tunesmith.config.policy import longest_answer
from tunesmith.data.collator import target_rows
from tunesmith.losses.advantage import group_advantages
from tunesmith.losses.policy import Aggregation, kl_estimate, token_weights
from tunesmith.stages.policy import Measured, PolicyPeftTrainer
from tunesmith.stages.scores import policy_scores
from tunesmith.types import Batch, LossOutput, PolicyTargets

_WEIGHTS: dict[str, Aggregation] = {"grpo": "sequence_mean", "dapo": "token_mean", "dr_grpo": "constant"}


class GRPOPeftTrainer(PolicyPeftTrainer):
    """Advantages over the other answers to the same prompt."""

    def targets(self, rollout: Sequence[Measured]) -> list[PolicyTargets]:
        """Step 6: an answer's advantage in its group goes to all of its tokens."""
        policy = self.policy
        scores_A, groups_A = (torch.cat([getattr(part, name) for part in rollout]) for name in ("scores_R", "groups_R"))
        advantages_A = group_advantages(scores_A, groups_A, policy.scale_rewards, policy.group_baseline)
        scores_GN = scores_A.view(-1, policy.num_generations or 1)  # answers to one prompt follow each other
        uniform_G = scores_GN.amax(1) == scores_GN.amin(1)
        self.fresh["uniform_groups"] = (int(uniform_G.sum()), len(uniform_G))
        found, longest = [], float(longest_answer(policy, self.given.generating))
        for part, advantages_R in zip(rollout, advantages_A.split([len(part.scores_R) for part in rollout]), strict=True):
            row_S = target_rows(part.batch)
            weights_S, total = token_weights(row_S, len(part.batch.lengths), _WEIGHTS[policy.grpo_loss], longest)
            if policy.mask_truncated:
                weights_S = weights_S * part.ended_R[row_S]
                if policy.grpo_loss == "dapo":
                    total = float(weights_S.sum())  # tokens that count; the others divide by answers, as if they taught nothing
            part.batch = replace(part.batch, weights_S=weights_S, total_weight=total)
            found.append(PolicyTargets(row_S, advantages_R[row_S], part.logp_S, part.reference_S))
        return found

    def compute_loss(self, batch: Batch) -> LossOutput:
        """Steps 4, 8 and 10: the clipped loss, the divergence from the reference, the entropy."""
        policy, taught = self.policy, batch.policy
        assert taught is not None
        logp_S, entropy_S, _ = policy_scores(self.given, batch, self.given.generating.temperature, policy.entropy_coef > 0)
        assert entropy_S is not None
        losses_S, watched = self.surrogate(batch, logp_S, policy.importance_level)
        watched |= {"policy_loss": losses_S, "entropy": entropy_S}
        more: dict[str, tuple[float, int]] = {}
        if taught.reference_S is not None:
            kl_S = kl_estimate(logp_S, taught.reference_S, policy.kl_estimator or "k3")
            losses_S = losses_S + (policy.kl_coef or 0.0) * kl_S
            more["kl"] = (float(kl_estimate(logp_S.detach(), taught.reference_S, "k1").sum()), len(batch.lengths))
        if policy.entropy_coef:
            losses_S = losses_S - policy.entropy_coef * entropy_S
        result = self.outcome(batch, losses_S, watched)
        return LossOutput(result.sum, result.count, {**result.metrics, **more})

"""Proximal policy optimisation on one trunk: policy and values, reference and reward model are roles of it.

Schulman et al., arXiv 1707.06347; Ouyang et al., arXiv 2203.02155, for what the rewards of tokens are. The numbers of the steps
are those of ``docs/rl.md``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tunesmith.data.collator import target_rows
from tunesmith.losses.advantage import gae, token_rewards, whiten
from tunesmith.losses.policy import clipped_value_loss, explained_variance, kl_estimate
from tunesmith.model.adapter import head_of
from tunesmith.stages.policy import Measured, PolicyPeftTrainer
from tunesmith.stages.scores import policy_scores
from tunesmith.types import Batch, LossOutput, PolicyTargets


class PPOPeftTrainer(PolicyPeftTrainer):
    """Advantages from a value head; clipped losses of policy and values."""

    needs_values = True

    def targets(self, rollout: Sequence[Measured]) -> list[PolicyTargets]:
        """Steps 4 to 6: token rewards, generalised advantages and returns, whitened over the whole rollout."""
        policy, sizes = self.policy, [part.batch.num_targets for part in rollout]
        rows = [target_rows(part.batch) for part in rollout]
        rewards = []
        for part, row_S in zip(rollout, rows, strict=True):
            assert part.logp_S is not None
            kl_S = torch.zeros_like(part.logp_S)
            if part.reference_S is not None:
                kl_S = kl_estimate(part.logp_S, part.reference_S, policy.kl_estimator or "k1")
            rewards.append(token_rewards(part.scores_R, kl_S, row_S, self.control.coef))
        if policy.whiten_rewards:
            rewards = list(whiten(torch.cat(rewards), shift_mean=False).split(sizes))
        found = []
        for part, row_S, rewards_S in zip(rollout, rows, rewards, strict=True):
            assert part.values_S is not None
            found.append(gae(rewards_S, part.values_S, row_S, policy.gamma, policy.gae_lambda))
        advantages = torch.cat([advantages_S for advantages_S, _ in found])
        if policy.whiten_advantages:
            advantages = whiten(advantages)
        self._steer(rollout)
        parts = zip(rollout, rows, advantages.split(sizes), found, strict=True)
        return [
            PolicyTargets(row_S, advantages_S, part.logp_S, None, part.values_S, returns_S)
            for part, row_S, advantages_S, (_, returns_S) in parts
        ]

    def _steer(self, rollout: Sequence[Measured]) -> None:
        """Step 11: how far answers are from the reference; its factor is adapted for the next time."""
        known = [
            (part.logp_S, part.reference_S) for part in rollout if part.logp_S is not None and part.reference_S is not None
        ]
        if not known:
            return
        total = sum(float(kl_estimate(logp_S, reference_S, "k1").sum()) for logp_S, reference_S in known)
        answers = sum(len(part.scores_R) for part in rollout)
        self.fresh["kl"] = (total, answers)
        if self.policy.kl_control == "adaptive":
            self.fresh["kl_coef"] = (self.control.coef, 1)
        self.control = self.control.updated(total / answers, answers)

    def compute_loss(self, batch: Batch) -> LossOutput:
        """Steps 8 to 10: policy, values and entropy of each answer token, from one forward pass."""
        policy, taught = self.policy, batch.policy
        assert taught is not None and taught.values_S is not None and taught.returns_S is not None
        logp_S, entropy_S, values_S = policy_scores(
            self.given, batch, self.given.generating.temperature, policy.entropy_coef > 0, head_of(self.model)
        )
        assert values_S is not None and entropy_S is not None
        policy_S, watched = self.surrogate(batch, logp_S)
        value_S = clipped_value_loss(values_S, taught.values_S, taught.returns_S, policy.cliprange_value)
        losses_S = policy_S + policy.vf_coef * value_S
        if policy.entropy_coef:
            losses_S = losses_S - policy.entropy_coef * entropy_S
        watched |= {"policy_loss": policy_S, "value_loss": value_S, "entropy": entropy_S}
        result = self.outcome(batch, losses_S, watched)
        explained = explained_variance(values_S.detach(), taught.returns_S)
        return LossOutput(result.sum, result.count, {**result.metrics, "explained_variance": (explained, 1)})

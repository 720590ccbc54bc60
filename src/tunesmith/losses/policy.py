"""Losses of policy optimisation: PPO, GRPO and their kin, for each token, unreduced.

Flat as in ``losses/advantage.py``: ``S`` tokens of ``R`` answers; ``row_S`` (int64, not decreasing) says of which answer each
token is. ``logp`` is under the model as it is trained, ``old`` under the one that sampled, ``reference`` under the one that the
model is to stay close to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch

Estimator = Literal["k1", "k2", "k3"]
Level = Literal["token", "sequence"]
Aggregation = Literal["token_mean", "sequence_mean", "constant"]

_LARGEST_ERROR = 0.2
"""How much of the relative error of a divergence counts at most (arXiv 1909.08593, section 2.2)."""


# ---- divergence


def kl_estimate(logp_S: torch.Tensor, reference_S: torch.Tensor, kind: Estimator) -> torch.Tensor:
    """Estimates of ``KL(model || reference)`` from tokens that the model sampled, differentiable, ``[S]``.

    With ``d = reference - logp``: ``k1 = -d``, without bias and of either sign; ``k2 = d^2 / 2``, small in variance;
    ``k3 = exp(d) - 1 - d``, without bias and never negative (Schulman, joschu.net/blog/kl-approx.html). As a loss, ``k1`` has a
    gradient of mean 0; ``k2`` has that of the divergence.

    Args:
        logp_S: under the model, float ``[S]``.
        reference_S: under the reference, float ``[S]``.
        kind: ``k1``, ``k2`` or ``k3``.

    Example:
        ``logp = -1``, ``reference = -2``, so ``d = -1``: 1, 0.5 and ``e^-1 = 0.3679``.
    """
    assert logp_S.shape == reference_S.shape, (logp_S.shape, reference_S.shape)
    d_S = reference_S - logp_S
    if kind == "k1":
        return -d_S
    return d_S**2 / 2 if kind == "k2" else torch.expm1(d_S) - d_S


def approx_kl(logp_S: torch.Tensor, old_S: torch.Tensor) -> torch.Tensor:
    """How far the model has moved from the one that sampled: ``k3`` of ``KL(old || model)``, ``r - 1 - log r``, ``[S]``.

    Example:
        ``logp = -2``, ``old = -1``: ``e^-1 - 1 + 1 = 0.3679``.
    """
    return kl_estimate(old_S, logp_S, "k3").detach()


class KLController(Protocol):
    """What holds the factor of the divergence from the reference."""

    @property
    def coef(self) -> float:
        """The factor for the next iteration."""

    def updated(self, kl: float, samples: int) -> KLController:
        """After an iteration whose answers have diverged by ``kl`` in the mean, summed over an answer's tokens."""

    def state(self) -> dict[str, float]:
        """Numbers that JSON keeps exactly."""

    def restored(self, state: Mapping[str, float]) -> KLController:
        """With what ``state`` gave."""


@dataclass(frozen=True, slots=True)
class FixedKL:
    """A factor that stays.

    Attributes:
        coef: the factor.
    """

    coef: float

    def updated(self, kl: float, samples: int) -> FixedKL:
        """Itself."""
        return self

    def state(self) -> dict[str, float]:
        """The factor."""
        return {"coef": self.coef}

    def restored(self, state: Mapping[str, float]) -> FixedKL:
        """With the factor of ``state``."""
        return replace(self, coef=float(state["coef"]))


@dataclass(frozen=True, slots=True)
class AdaptiveKL:
    """A factor that grows while the divergence is above its target, and shrinks below (arXiv 1909.08593, section 2.2).

    ``coef <- coef (1 + clip((kl - target) / target, -0.2, 0.2) samples / horizon)``; the paper's ``K`` of 0.1 is
    ``samples / horizon``.

    Attributes:
        coef: the factor.
        target: divergence aimed at, of an answer.
        horizon: answers over which the factor changes by as much as the clipped error.
    """

    coef: float
    target: float
    horizon: float

    def __post_init__(self) -> None:
        """Numbers that are divided by are positive."""
        assert self.target > 0 and self.horizon > 0, (self.target, self.horizon)

    def updated(self, kl: float, samples: int) -> AdaptiveKL:
        """After ``samples`` answers that have diverged by ``kl`` in the mean.

        Example:
            Factor 0.2, target 6, horizon 100; 12 in the mean of 10 answers: the error 1 counts as 0.2, so the factor is
            ``0.2 (1 + 0.02) = 0.204``.
        """
        error = min(max(kl / self.target - 1, -_LARGEST_ERROR), _LARGEST_ERROR)
        return replace(self, coef=self.coef * (1 + error * samples / self.horizon))

    def state(self) -> dict[str, float]:
        """The factor; target and horizon are settings."""
        return {"coef": self.coef}

    def restored(self, state: Mapping[str, float]) -> AdaptiveKL:
        """With the factor of ``state``."""
        return replace(self, coef=float(state["coef"]))


# ---- the policy


def clipped_policy_loss(
    logp_S: torch.Tensor,
    old_S: torch.Tensor,
    advantages_S: torch.Tensor,
    row_S: torch.Tensor,
    low: float,
    high: float,
    level: Level = "token",
    dual: float | None = None,
) -> torch.Tensor:
    """``-min(r A, clip(r, 1 - low, 1 + high) A)`` of each token: PPO (arXiv 1707.06347, eq. 7).

    ``high > low`` is clip-higher (DAPO, arXiv 2503.14476, eq. 10). ``r`` is the ratio of the token's probabilities, or of level
    ``sequence`` the answer's, to the power of one over its length (GSPO, arXiv 2507.18071, eq. 5 and 7): each of its tokens
    then has the answer's loss, and the gradient goes to all of them.

    Args:
        logp_S: log-probabilities of the tokens under the model, ``[S]``.
        old_S: under the one that sampled, ``[S]``.
        advantages_S: ``[S]``.
        row_S: int64 ``[S]``, answer of each token; answers are whole where the level is ``sequence``.
        low: how far below 1 a ratio counts.
        high: how far above 1.
        level: of the ratio.
        dual: of a negative advantage no loss is above ``-dual A`` (arXiv 1912.09729), ``dual > 1``; None: unbounded.

    Returns:
        float ``[S]``, unreduced; gradients go to ``logp_S`` alone.

    Example:
        ``r = 1.5``, ``low = high = 0.2``: of ``A = 2`` it is ``-1.2 * 2 = -2.4``, of ``A = -2`` ``1.5 * 2 = 3``. ``r = 4``,
        ``A = -2``, ``dual = 3``: ``min(8, 6) = 6``. Ratios 1 and 1.44 of one answer: both count as ``sqrt(1.44) = 1.2``.
    """
    assert advantages_S.shape == logp_S.shape, (advantages_S.shape, logp_S.shape)
    assert dual is None or dual > 1, dual
    ratio_S = importance_ratio(logp_S, old_S, row_S, level)
    advantages_S = advantages_S.detach()
    losses_S = torch.maximum(-ratio_S * advantages_S, -ratio_S.clamp(1 - low, 1 + high) * advantages_S)
    if dual is None:
        return losses_S
    return torch.where(advantages_S < 0, torch.minimum(losses_S, -dual * advantages_S), losses_S)


@torch.no_grad()
def clipped_tokens(
    logp_S: torch.Tensor,
    old_S: torch.Tensor,
    advantages_S: torch.Tensor,
    row_S: torch.Tensor,
    low: float,
    high: float,
    level: Level = "token",
) -> torch.Tensor:
    """Where ``clipped_policy_loss`` has no gradient because of its clip, bool ``[S]``; its mean is the clip share.

    A ratio above ``1 + high`` with a positive advantage, or below ``1 - low`` with a negative one.

    Example:
        ``r = 1.5``, ``high = 0.2``: yes of ``A = 2``, no of ``A = -2``.
    """
    ratio_S = importance_ratio(logp_S, old_S, row_S, level)
    return ((ratio_S > 1 + high) & (advantages_S > 0)) | ((ratio_S < 1 - low) & (advantages_S < 0))


def importance_ratio(logp_S: torch.Tensor, old_S: torch.Tensor, row_S: torch.Tensor, level: Level = "token") -> torch.Tensor:
    """How much likelier a token has become, ``exp(logp - old)``, or its whole answer per token; differentiable, ``[S]``.

    Times ``k3`` of ``kl_estimate`` it estimates the divergence of the model as it is now, with a gradient without bias (arXiv
    2512.02556).

    Example:
        Ratios 1 and 1.44 of one answer; of level ``sequence`` both are ``sqrt(1 * 1.44) = 1.2``.
    """
    assert logp_S.shape == old_S.shape == row_S.shape, (logp_S.shape, old_S.shape, row_S.shape)
    log_ratio_S = logp_S - old_S.detach()
    if level == "token":
        return log_ratio_S.exp()
    rows = int(row_S[-1]) + 1 if len(row_S) else 0
    sums_R = log_ratio_S.new_zeros(rows).index_add(0, row_S, log_ratio_S)
    lengths_R = row_S.bincount(minlength=rows).clamp(min=1)
    return (sums_R / lengths_R).exp()[row_S]


def token_weights(
    row_S: torch.Tensor, rows: int, kind: Aggregation, constant: float | None = None
) -> tuple[torch.Tensor, float]:
    """Factors of tokens, and a total, such that ``sum(weights * losses) / total`` is the loss of a method.

    Totals of micro-batches add up, so a loss does not depend on how answers are divided into them.

    - ``token_mean``: every token counts the same: DAPO (arXiv 2503.14476, eq. 8);
    - ``sequence_mean``: every answer counts the same: GRPO (arXiv 2402.03300, eq. 3);
    - ``constant``: a token counts ``1 / constant``, say the longest answer allowed, whatever the length of its answer: Dr. GRPO
      (arXiv 2503.20783).

    Args:
        row_S: int64 ``[S]``, answer of each token.
        rows: answers, with those that have no tokens here.
        kind: which.
        constant: positive; for ``constant`` only.

    Returns:
        float32 ``[S]``, and the total: tokens for ``token_mean``, else ``rows``.

    Example:
        Answers ``[0, 0, 1]``: ``[1, 1, 1]`` and 3; ``[0.5, 0.5, 1]`` and 2; of the constant 4 ``[0.25, 0.25, 0.25]`` and 2.
    """
    weights_S = torch.ones(row_S.shape, device=row_S.device)
    if kind == "token_mean":
        return weights_S, float(len(row_S))
    if kind == "sequence_mean":
        return weights_S / row_S.bincount(minlength=rows)[row_S], float(rows)
    assert constant is not None and constant > 0, constant
    return weights_S / constant, float(rows)


# ---- values


def clipped_value_loss(
    values_S: torch.Tensor, old_values_S: torch.Tensor, returns_S: torch.Tensor, clip: float | None
) -> torch.Tensor:
    """``max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / 2`` of each token, as PPO's authors run it.

    Args:
        values_S: of the model as it is trained, ``[S]``.
        old_values_S: when the answers were collected, ``[S]``.
        returns_S: what is learned, ``[S]``.
        clip: how far a value may move from the old one before that is ignored; None: as far as it likes.

    Returns:
        float ``[S]``, unreduced.

    Example:
        ``V = 1``, ``V_old = 0``, ``R = 2``, ``clip = 0.2``: ``max(1, 1.8^2) / 2 = 1.62``; without a clip 0.5.
    """
    assert values_S.shape == old_values_S.shape == returns_S.shape, (values_S.shape, old_values_S.shape, returns_S.shape)
    returns_S, old_values_S = returns_S.detach(), old_values_S.detach()
    errors_S = (values_S - returns_S) ** 2
    if clip is not None:
        near_S = old_values_S + (values_S - old_values_S).clamp(-clip, clip)
        errors_S = torch.maximum(errors_S, (near_S - returns_S) ** 2)
    return errors_S / 2


def explained_variance(values_S: torch.Tensor, returns_S: torch.Tensor) -> float:
    """``1 - var(returns - values) / var(returns)``: 1 of perfect values, 0 of constant ones; 0 too of constant returns.

    Example:
        Returns ``[0, 2]``, values ``[0, 1]``: ``1 - 0.5 / 2 = 0.75``.
    """
    assert values_S.shape == returns_S.shape, (values_S.shape, returns_S.shape)
    if len(returns_S) < 2:
        return 0.0
    spread = float(returns_S.detach().var())
    return 1 - float((returns_S - values_S).detach().var()) / spread if spread > 0 else 0.0

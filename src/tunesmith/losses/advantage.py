"""From scores of answers to advantages of their tokens.

Everything is flat: the tokens of ``R`` answers lie end to end, ``S`` in all, and ``row_S`` (int64) says of which answer each
token is. The answers' tokens are contiguous and in order, so ``row_S`` does not decrease; there is no padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

Scale = Literal["group", "batch", "none"]
Baseline = Literal["mean", "leave_one_out"]

_LEAST_DEVIATION = 1e-4
"""Added to a deviation that is divided by, so that a group of equal scores gives 0."""
_LEAST_VARIANCE = 1e-8


def token_rewards(scores_R: torch.Tensor, kl_S: torch.Tensor, row_S: torch.Tensor, kl_coef: float) -> torch.Tensor:
    """Reward of each token: ``-kl_coef kl``, and at the last token of an answer its score too (arXiv 1909.08593, eq. 2).

    Args:
        scores_R: of whole answers, ``[R]``; that of an answer without tokens has no place and is lost.
        kl_S: how far each token is from the reference, ``[S]``.
        row_S: int64 ``[S]``, answer of each token.
        kl_coef: factor of the divergence.

    Returns:
        float ``[S]``, in the dtype of ``kl_S``.

    Example:
        Scores 1 and 2, ``kl = [0.5, 1, 2]`` of answers ``[0, 0, 1]``, ``kl_coef = 0.1``: ``[-0.05, 0.9, 1.8]``.
    """
    assert scores_R.ndim == 1 and kl_S.shape == row_S.shape, (scores_R.shape, kl_S.shape, row_S.shape)
    scores_S = scores_R.to(kl_S.dtype)[row_S]
    return torch.where(_last(row_S), scores_S - kl_coef * kl_S, -kl_coef * kl_S)


def gae(
    rewards_S: torch.Tensor, values_S: torch.Tensor, row_S: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16), no value after an answer's last token.

    ``A_t = sum over i of (gamma lam)^i d_(t+i)`` within the answer, with ``d_t = r_t + gamma V_(t+1) - V_t``. The sums are made
    by doubling: after ``n`` rounds each token has those of ``2^n`` tokens from it on, so the longest answer needs as many
    rounds as its length has binary digits.

    Args:
        rewards_S: float ``[S]``.
        values_S: what was expected at each token, before it was chosen, ``[S]``.
        row_S: int64 ``[S]``, answer of each token.
        gamma: discount of later rewards.
        lam: 0 trusts the values, 1 the rewards.

    Returns:
        Advantages and returns ``A + V``, float ``[S]`` each, without gradient.

    Example:
        ``r = [0, 1]``, ``V = [0.5, 0.6]``, ``gamma = 1``, ``lam = 0.5``: ``d = [0.1, 0.4]``, advantages ``[0.3, 0.4]``, returns
        ``[0.8, 1.0]``.
    """
    assert rewards_S.shape == values_S.shape == row_S.shape, (rewards_S.shape, values_S.shape, row_S.shape)
    values_S = values_S.detach()
    next_S = torch.zeros_like(values_S)
    next_S[:-1] = torch.where(_last(row_S)[:-1], 0.0, values_S[1:])
    sums_S = rewards_S.detach() + gamma * next_S - values_S
    step, factor = 1, gamma * lam
    while step < len(row_S) and factor:
        same = row_S[step:] == row_S[:-step]
        if not same.any():
            break
        sums_S = torch.cat([sums_S[:-step] + torch.where(same, factor * sums_S[step:], 0.0), sums_S[-step:]])
        step, factor = 2 * step, factor * factor
    return sums_S, sums_S + values_S


def group_advantages(
    scores_R: torch.Tensor, group_R: torch.Tensor, scale: Scale = "group", baseline: Baseline = "mean"
) -> torch.Tensor:
    """Advantage of each answer over the other answers to its prompt.

    ``score - mean`` of the group, divided by the group's standard deviation: GRPO (arXiv 2402.03300, section 4.1.2); by that of
    all scores: ``batch``; by nothing: Dr. GRPO (arXiv 2503.20783). ``leave_one_out`` takes the mean of the others, as RLOO does
    (arXiv 2402.14740), which is ``n / (n - 1)`` times as much. Deviations are of samples (``n - 1``), plus 1e-4.

    Args:
        scores_R: ``[R]``.
        group_R: int64 ``[R]``, prompt of each answer, in any order.
        scale: whose deviation is divided by.
        baseline: what is subtracted.

    Returns:
        float ``[R]``; 0 in a group of one, with which there is nothing to compare.

    Example:
        Scores ``[1, 0, 0, 1]`` of one group: mean 0.5, deviation 0.5774: ``[0.8659, -0.8659, -0.8659, 0.8659]``; unscaled
        ``[0.5, -0.5, -0.5, 0.5]``; leaving one out, unscaled ``[0.6667, -0.6667, -0.6667, 0.6667]``.
    """
    assert scores_R.ndim == 1 and scores_R.shape == group_R.shape, (scores_R.shape, group_R.shape)
    if not len(scores_R):
        return torch.zeros_like(scores_R)
    _, group_R = group_R.unique(return_inverse=True)
    counts_R = group_R.bincount()[group_R].to(scores_R.dtype)
    away_R = scores_R - _group_sums(scores_R, group_R) / counts_R
    others_R = (counts_R - 1).clamp(min=1)
    advantages_R = away_R * counts_R / others_R if baseline == "leave_one_out" else away_R
    if scale == "group":
        return advantages_R / ((_group_sums(away_R**2, group_R) / others_R).sqrt() + _LEAST_DEVIATION)
    if scale == "batch":
        return advantages_R / (_variance(scores_R).sqrt() + _LEAST_DEVIATION)
    return advantages_R


def whiten(values_S: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
    """Mean 0 and variance 1, as implementations of PPO do with advantages; rewards keep their mean (``shift_mean=False``).

    ``(x - mean) / sqrt(var + 1e-8)`` with the variance of a sample; one value alone has none.

    Args:
        values_S: ``[S]``, of all tokens of an iteration.
        shift_mean: False adds the mean again.

    Example:
        ``[1, 2, 3]``: ``[-1, 0, 1]``, or ``[1, 2, 3]`` with the mean kept.
    """
    mean = values_S.mean() if len(values_S) else values_S.new_zeros(())
    whitened_S = (values_S - mean) * (_variance(values_S) + _LEAST_VARIANCE).rsqrt()
    return whitened_S if shift_mean else whitened_S + mean


def clip_scores(scores_R: torch.Tensor, bound: float) -> torch.Tensor:
    """Scores no further from 0 than ``bound``, which is positive.

    Example:
        ``[-7, 2]`` with a bound of 5: ``[-5, 2]``.
    """
    assert bound > 0, bound
    return scores_R.clamp(-bound, bound)


@dataclass(frozen=True, slots=True)
class RunningMoments:
    """Mean and variance of all scores of a run, without keeping them.

    Counts, means and squared distances of two parts are joined as by Chan, Golub and LeVeque (1979), in Python's floats, so a
    run that goes on from ``state`` has the same numbers.

    Attributes:
        count: scores seen.
        mean: of them.
        squares: sum of their squared distances from the mean.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    @classmethod
    def from_state(cls, state: Mapping[str, float]) -> RunningMoments:
        """What ``state`` gave."""
        return cls(int(state["count"]), float(state["mean"]), float(state["squares"]))

    def state(self) -> dict[str, float]:
        """Numbers that JSON keeps exactly."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    @property
    def deviation(self) -> float:
        """Of a sample; 1 as long as all scores are the same, which says nothing of how they are scaled."""
        return float((self.squares / (self.count - 1)) ** 0.5) if self.squares > 0 else 1.0

    def updated(self, scores_R: torch.Tensor) -> RunningMoments:
        """With further scores, ``[R]``.

        Example:
            1 and 3, then 5: mean 2 and squares 2, then mean 3 and squares ``2 + 0 + 3^2 * 2 / 3 = 8``: a deviation of 2.
        """
        if not len(scores_R):
            return self
        new_R = scores_R.detach().double()
        count = len(scores_R)
        mean = float(new_R.mean())
        squares = float(((new_R - mean) ** 2).sum())
        total, gap = self.count + count, mean - self.mean
        return RunningMoments(
            total, self.mean + gap * count / total, self.squares + squares + gap * gap * self.count * count / total
        )

    def normalised(self, scores_R: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
        """``(score - mean) / (deviation + 1e-4)``, ``[R]``; without ``shift_mean`` the mean is not subtracted.

        Example:
            Mean 3, deviation 2, score 5: 1.0 (0.99995), or 2.5 without the shift.
        """
        return (scores_R - self.mean * shift_mean) / (self.deviation + _LEAST_DEVIATION)


def _last(row_S: torch.Tensor) -> torch.Tensor:
    """Whether a token is the last of its answer, bool ``[S]``."""
    last_S = torch.ones_like(row_S, dtype=torch.bool)
    last_S[:-1] = row_S[1:] != row_S[:-1]
    return last_S


def _group_sums(values_R: torch.Tensor, group_R: torch.Tensor) -> torch.Tensor:
    """For each answer the sum over its group; groups are numbered without gaps or with."""
    sums_G = values_R.new_zeros(len(values_R)).index_add_(0, group_R, values_R)
    return sums_G[group_R]


def _variance(values_S: torch.Tensor) -> torch.Tensor:
    """Of a sample; 0 of fewer than two values."""
    return values_S.var() if len(values_S) > 1 else values_S.new_zeros(())

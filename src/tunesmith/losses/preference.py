"""Losses of preference pairs, as one dictionary of pure functions.

Each takes the log-probabilities of both answers of ``P`` pairs, under the model and under its reference, and returns a loss for
each pair, unreduced. Written ``c`` and ``r`` below: log-ratios of model to reference of the chosen and the rejected answer;
``C`` and ``R``: the model's own log-probabilities, ``C/n`` their mean over an answer's tokens.

Examples in the docstrings are of one pair with ``c = 1, r = -1`` and ``beta = 0.5`` unless they say otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid


@dataclass(frozen=True, slots=True)
class PairLogps:
    """Log-probabilities of the answers of ``P`` pairs, float32 ``[P]`` each, summed over an answer's tokens.

    Attributes:
        chosen, rejected: under the model.
        reference_chosen, reference_rejected: under the reference; None where a loss needs none.
        chosen_tokens, rejected_tokens: tokens of each answer.
    """

    chosen: torch.Tensor
    rejected: torch.Tensor
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor
    reference_chosen: torch.Tensor | None = None
    reference_rejected: torch.Tensor | None = None

    def __post_init__(self) -> None:
        """Every tensor has one number for each pair."""
        for tensor in (self.rejected, self.chosen_tokens, self.rejected_tokens, self.reference_chosen, self.reference_rejected):
            assert tensor is None or tensor.shape == self.chosen.shape, (tensor.shape, self.chosen.shape)
        assert self.chosen.ndim == 1, self.chosen.shape

    @property
    def chosen_ratio(self) -> torch.Tensor:
        """``c``."""
        assert self.reference_chosen is not None
        return self.chosen - self.reference_chosen

    @property
    def rejected_ratio(self) -> torch.Tensor:
        """``r``."""
        assert self.reference_rejected is not None
        return self.rejected - self.reference_rejected

    @property
    def margin(self) -> torch.Tensor:
        """``c - r``."""
        return self.chosen_ratio - self.rejected_ratio

    @property
    def chosen_mean(self) -> torch.Tensor:
        """``C/n``."""
        return self.chosen / self.chosen_tokens

    @property
    def rejected_mean(self) -> torch.Tensor:
        """``R/n``."""
        return self.rejected / self.rejected_tokens


@dataclass(frozen=True, slots=True)
class PreferenceOptions:
    """Numbers of the losses.

    Attributes:
        beta: strength; how far from the reference, where there is one.
        label_smoothing: share of pairs that are taken to be labelled the wrong way round.
        simpo_gamma: margin that SimPO asks for.
        discopop_tau: temperature of DiscoPOP.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5
    discopop_tau: float = 0.05


_SURE = 1e-8
"""``-log p`` of a probability that is as good as 1."""

PairLoss = Callable[[PairLogps, PreferenceOptions], torch.Tensor]


def _smoothed(z: torch.Tensor, smoothing: float) -> torch.Tensor:
    """``-(1 - e) log sigmoid(z) - e log sigmoid(-z)``."""
    return -(1 - smoothing) * logsigmoid(z) - smoothing * logsigmoid(-z)


# ---- against a reference


def sigmoid(pairs: PairLogps, options: PreferenceOptions) -> torch.Tensor:
    """Direct preference optimisation (arXiv 2305.18290, eq. 7); with smoothing cDPO.

    ``-log sigmoid(beta (c - r))``.

    Example: ``-log sigmoid(1) = 0.3133``.
    """
    return _smoothed(options.beta * pairs.margin, options.label_smoothing)


def sigmoid_norm(pairs: PairLogps, options: PreferenceOptions) -> torch.Tensor:
    """DPO of log-ratios per token, ``-log sigmoid(beta (c/n_c - r/n_r))`` (arXiv 2411.15124, eq. 6).

    Example: both answers of 2 tokens: ``-log sigmoid(0.5) = 0.4741``.
    """
    return -logsigmoid(options.beta * (pairs.chosen_ratio / pairs.chosen_tokens - pairs.rejected_ratio / pairs.rejected_tokens))


def hinge(pairs: PairLogps, options: PreferenceOptions) -> torch.Tensor:
    """``max(0, 1 - beta (c - r))``: SLiC's loss (arXiv 2305.10425) on log-ratios, as in RSO (arXiv 2309.06657, eq. 11).

    Example: ``1 - 1 = 0``.
    """
    return torch.relu(1 - options.beta * pairs.margin)


def ipo(pairs: PairLogps, options: PreferenceOptions) -> torch.Tensor:
    """``(c/n_c - r/n_r - 1 / (2 beta))^2`` (arXiv 2310.12036, eq. 17), per token as its authors run it.

    Example: both answers of 2 tokens: ``(0.5 + 0.5 - 1)^2 = 0``.
    """
    margin = pairs.chosen_ratio / pairs.chosen_tokens - pairs.rejected_ratio / pairs.rejected_tokens
    return (margin - 1 / (2 * options.beta)) ** 2


def robust(pairs: PairLogps, options: PreferenceOptions) -> torch.Tensor:
    """DPO unbiased under labels flipped with probability ``e`` (arXiv 2403.00409, eq. 12).

    ``(-(1 - e) log sigmoid(z) + e log sigmoid(-z)) / (1 - 2 e)`` with ``z = beta (c - r)``.

    Example: ``e = 0.1``: ``(0.9 * 0.3133 - 0.1 * 1.3133) / 0.8 = 0.1883``.
    """
    z, flipped = options.beta * pairs.margin, options.label_smoothing
    return (-(1 - flipped) * logsigmoid(z) + flipped * logsigmoid(-z)) / (1 - 2 * flipped)


def exo_pair(pairs: PairLogps, options: PreferenceOptions) -> torch.Tensor:
    """Reverse KL of the model's choice to smoothed labels ``1 - e, e`` (arXiv 2402.00856, eq. 16).

    Example: ``e = 0.1``: ``0.7311 (-0.3133 + 0.1054) + 0.2689 (-1.3133 + 2.3026) = 0.1141``.
    """
    z = options.beta * pairs.margin
    wrong = z.new_tensor(options.label_smoothing)
    return torch.sigmoid(z) * (logsigmoid(z) - torch.log1p(-wrong)) + torch.sigmoid(-z) * (logsigmoid(-z) - torch.log(wrong))


def nca_pair(pairs: PairLogps, options: PreferenceOptions) -> torch.Tensor:
    """``-log sigmoid(beta c) - (log sigmoid(-beta c) + log sigmoid(-beta r)) / 2`` (arXiv 2402.05369, eq. 11).

    Example: ``0.4741 + (0.9741 + 0.4741) / 2 = 1.1982``.
    """
    chosen, rejected = options.beta * pairs.chosen_ratio, options.beta * pairs.rejected_ratio
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def bco_pair(pairs: PairLogps, options: PreferenceOptions) -> torch.Tensor:
    """``-log sigmoid(beta c) - log sigmoid(-beta r)``: a classifier of answers (arXiv 2404.04656), its shift left out.

    Example: ``0.4741 + 0.4741 = 0.9482``.
    """
    return -logsigmoid(options.beta * pairs.chosen_ratio) - logsigmoid(-options.beta * pairs.rejected_ratio)


def sppo_hard(pairs: PairLogps, options: PreferenceOptions) -> torch.Tensor:
    """``(c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2``: SPPO with certain wins (arXiv 2405.00675, eq. 4.7).

    Example: ``(1 - 1)^2 + (-1 + 1)^2 = 0``.
    """
    half = 0.5 / options.beta
    return (pairs.chosen_ratio - half) ** 2 + (pairs.rejected_ratio + half) ** 2


def apo_zero(pairs: PairLogps, options: PreferenceOptions) -> torch.Tensor:
    """``1 - sigmoid(beta c) + sigmoid(beta r)``: chosen answers are better than the model (arXiv 2408.06266, eq. 7).

    Example: ``1 - 0.6225 + 0.3775 = 0.7551``.
    """
    return 1 - torch.sigmoid(options.beta * pairs.chosen_ratio) + torch.sigmoid(options.beta * pairs.rejected_ratio)


def apo_down(pairs: PairLogps, options: PreferenceOptions) -> torch.Tensor:
    """``sigmoid(beta c) + 1 - sigmoid(beta (c - r))``: chosen answers are worse than the model (arXiv 2408.06266, eq. 8).

    Example: ``0.6225 + 1 - 0.7311 = 0.8914``.
    """
    return torch.sigmoid(options.beta * pairs.chosen_ratio) + 1 - torch.sigmoid(options.beta * pairs.margin)


def discopop(pairs: PairLogps, options: PreferenceOptions) -> torch.Tensor:
    """A logistic and an exponential loss, blended by the margin (arXiv 2406.08414, eq. 5).

    ``(1 - s) (-log sigmoid(z)) + s exp(-z)`` with ``z = beta (c - r)``, ``s = sigmoid(z / tau)``.

    Example: ``tau = 1``: ``0.2689 * 0.3133 + 0.7311 * 0.3679 = 0.3532``.
    """
    z = options.beta * pairs.margin
    share = torch.sigmoid(z / options.discopop_tau)
    return -logsigmoid(z) * (1 - share) + torch.exp(logsigmoid(z / options.discopop_tau) - z)  # share * exp(-z) overflows


def kto_pair(pairs: PairLogps, options: PreferenceOptions) -> torch.Tensor:
    """KTO (arXiv 2402.01306, eq. 8) on both answers of a pair, the mean of the two.

    The reference point of chosen answers is the mean log-ratio of the batch's rejected ones, and the other way round, where it
    is not negative; no gradient flows through it. It depends on the micro-batch.

    Example: ``(1 - sigmoid(0.5 (1 - 0)) + 1 - sigmoid(0.5 (1 + 1))) / 2 = 0.3232``.
    """
    chosen, rejected = pairs.chosen_ratio, pairs.rejected_ratio
    chosen_point, rejected_point = (ratio.mean().clamp(min=0).detach() for ratio in (chosen, rejected))
    wins = 1 - torch.sigmoid(options.beta * (chosen - rejected_point))
    losses = 1 - torch.sigmoid(options.beta * (chosen_point - rejected))
    return (wins + losses) / 2


def aot(pairs: PairLogps, options: PreferenceOptions) -> torch.Tensor:
    """The model's margins, sorted, against the reference's, sorted (arXiv 2406.05882, paired). Depends on the micro-batch.

    Example of one pair: as ``sigmoid``.
    """
    assert pairs.reference_chosen is not None and pairs.reference_rejected is not None
    own = (pairs.chosen - pairs.rejected).sort().values
    return _smoothed(
        options.beta * (own - (pairs.reference_chosen - pairs.reference_rejected).sort().values), options.label_smoothing
    )


def aot_unpaired(pairs: PairLogps, options: PreferenceOptions) -> torch.Tensor:
    """Log-ratios of chosen answers, sorted, against those of rejected ones (arXiv 2406.05882). Depends on the micro-batch.

    Example of one pair: as ``sigmoid``.
    """
    margins = pairs.chosen_ratio.sort().values - pairs.rejected_ratio.sort().values
    return _smoothed(options.beta * margins, options.label_smoothing)


# ---- without a reference


def orpo(pairs: PairLogps, options: PreferenceOptions) -> torch.Tensor:
    """``-C/n - beta log sigmoid(log odds_c - log odds_r)`` (arXiv 2403.07691, eq. 6 and 7).

    ``odds = p / (1 - p)`` with ``p`` the exponential of the mean log-probability.

    Example: means of -0.5 and -1: odds 1.5415 and 0.5820: ``0.5 + 0.5 * 0.3203 = 0.6602``.
    """
    odds = _log_odds(pairs.chosen_mean) - _log_odds(pairs.rejected_mean)
    return -pairs.chosen_mean - options.beta * logsigmoid(odds)


def _log_odds(mean: torch.Tensor) -> torch.Tensor:
    """``log(p / (1 - p))`` of ``log p``; of a probability that is rounded to 1 a large number, without gradient."""
    mean = mean.clamp(max=-_SURE)
    return mean - torch.log(-torch.expm1(mean))


def simpo(pairs: PairLogps, options: PreferenceOptions) -> torch.Tensor:
    """``-log sigmoid(beta (C/n - R/n) - gamma)`` (arXiv 2405.14734, eq. 6).

    Example: means of -0.5 and -1, ``gamma = 0.5``: ``-log sigmoid(0.25 - 0.5) = 0.8259``.
    """
    return _smoothed(options.beta * (pairs.chosen_mean - pairs.rejected_mean) - options.simpo_gamma, options.label_smoothing)


def cpo(pairs: PairLogps, options: PreferenceOptions) -> torch.Tensor:
    """``-log sigmoid(beta (C - R))`` (arXiv 2401.08417, eq. 5); its term for the chosen answer is ``pref_ftx``.

    Example: ``C = -1, R = -2``: ``-log sigmoid(0.5) = 0.4741``.
    """
    return _smoothed(options.beta * (pairs.chosen - pairs.rejected), options.label_smoothing)


def sft(pairs: PairLogps, options: PreferenceOptions) -> torch.Tensor:
    """``-C/n``: the chosen answer is learned, each answer counted once.

    Example: a mean of -0.5: 0.5.
    """
    return -pairs.chosen_mean


LOSSES: Mapping[str, PairLoss] = {
    function.__name__: function
    for function in (
        sigmoid, sigmoid_norm, hinge, ipo, robust, exo_pair, nca_pair, bco_pair, sppo_hard, apo_zero, apo_down, discopop,
        kto_pair, aot, aot_unpaired, orpo, simpo, cpo, sft,
    )
}  # fmt: skip
"""Name -> loss."""


def preference_loss(pairs: PairLogps, weights: Mapping[str, float], options: PreferenceOptions) -> torch.Tensor:
    """Sum of losses, each with its weight.

    Args:
        pairs: of a micro-batch.
        weights: name -> weight.
        options: numbers of all of them.

    Returns:
        float32 ``[P]``, unreduced.
    """
    total = torch.zeros_like(pairs.chosen)
    for name, weight in weights.items():
        total = total + weight * LOSSES[name](pairs, options)
    return total

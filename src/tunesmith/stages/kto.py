"""Feedback learned directly (KTO): good answers become more likely than under a reference, bad ones less likely."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from tunesmith.config.arguments import FinetuningArguments, RunConfig, TrainingArguments
from tunesmith.data.kinds import Rows
from tunesmith.losses.feedback import kto_loss, reference_point
from tunesmith.model.memory import out_of_memory_explained
from tunesmith.stages.pairs import answer_logps
from tunesmith.stages.scores import batch_logprobs
from tunesmith.train.step import StepResult, means
from tunesmith.train.trainer import Ingredients, PeftTrainer
from tunesmith.types import Batch, FeedbackExample, LossOutput

_EVEN = (1.0, 4 / 3)
"""What the weight of all good answers may be of that of all bad ones, as TRL advises after arXiv 2402.01306."""


class FeedbackPeftTrainer(PeftTrainer):
    """KTO's loss on the log-ratio of each answer to its reference.

    The reference point is estimated from the mismatched answers of a whole update before its first backward pass, and of all
    evaluation rows before they are evaluated: how rows are divided into batches changes nothing.
    """

    def __init__(self, args: TrainingArguments, given: Ingredients) -> None:
        super().__init__(args, given)
        self._point = torch.zeros((), device=given.device)

    def training_step(self, window: Sequence[Batch]) -> StepResult:
        """One update, its reference point first."""
        if estimates(self.given.finetuning):
            self._point = self._estimated(window, f"step {self.state.step + 1}")
        return super().training_step(window)

    def evaluate(self) -> dict[str, float]:
        """As every stage, with the reference point of all evaluation rows."""
        trained_at = self._point
        if estimates(self.given.finetuning):
            self._point = self._estimated(self.eval_batches(), "in evaluation (see per_device_eval_batch_size)")
        try:
            return super().evaluate()
        finally:
            self._point = trained_at

    def compute_loss(self, batch: Batch) -> LossOutput:
        """Loss summed over the answers, each class with its weight; and what people watch, each class by itself."""
        tuning, good_P = self.given.finetuning, batch.desirable_P
        assert good_P is not None and batch.reference_2P is not None
        sums_P, tokens_P = answer_logps(batch, batch_logprobs(self.given, batch))
        ratio_P = sums_P - batch.reference_2P[0]
        good, bad = class_weights(tuning)
        losses_P = torch.where(good_P, good, bad) * kto_loss(ratio_P, good_P, self._point, tuning.pref_beta)
        if tuning.pref_ftx:
            losses_P = losses_P - tuning.pref_ftx * torch.where(good_P, sums_P / tokens_P, 0)
        watched = self._watched(good_P, sums_P.detach(), tuning.pref_beta * ratio_P.detach())
        return LossOutput(losses_P.sum(), batch.total_weight, watched)

    def watched(self, metrics: dict[str, tuple[float, int]]) -> dict[str, float]:
        """As every stage; the margin is that of the classes' mean rewards, where there are both."""
        found = means(metrics)
        if {"rewards/chosen", "rewards/rejected"} <= found.keys():
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        return found

    @torch.no_grad()
    def _estimated(self, batches: Iterable[Batch], where: str) -> torch.Tensor:
        """The reference point of all these rows, without dropout or noise; ``where`` is for messages."""
        training = self.model.training
        self.model.eval()
        ratios = []
        try:
            for batch in batches:
                assert batch.mismatched is not None and batch.reference_2P is not None
                with out_of_memory_explained(where, [batch.mismatched]):
                    rows = batch.mismatched.to(self.given.device)
                    sums_P, _ = answer_logps(rows, batch_logprobs(self.given, rows))
                ratios.append(sums_P - batch.reference_2P[1].to(self.given.device))
        finally:
            self.model.train(training)
        return reference_point(torch.cat(ratios))

    def _watched(self, good_P: torch.Tensor, logp_P: torch.Tensor, reward_P: torch.Tensor) -> dict[str, tuple[float, int]]:
        sums = [(values_P * side_P).sum() for side_P in (good_P, ~good_P) for values_P in (reward_P, logp_P)]
        point, count, *found = torch.stack([self._point, good_P.sum(), *sums]).tolist()
        sides = {"chosen": (round(count), found[:2]), "rejected": (len(good_P) - round(count), found[2:])}
        named = {
            f"{name}/{side}": (value, number)
            for side, (number, values) in sides.items()
            for name, value in zip(("rewards", "logps"), values, strict=True)
            if number
        }
        return named if not estimates(self.given.finetuning) else {"kl": (point, 1), **named}


def estimates(tuning: FinetuningArguments) -> bool:
    """Whether the loss has a reference point, for which mismatched answers are run."""
    return tuning.kto_loss == "kto"


def class_weights(tuning: FinetuningArguments) -> tuple[float, float]:
    """Weights of good and of bad answers, as numbers (see ``balanced``)."""
    good, bad = tuning.kto_chosen_weight, tuning.kto_rejected_weight
    assert not isinstance(good, str) and not isinstance(bad, str), (good, bad)
    return good, bad


def balanced(config: RunConfig, rows: Rows[FeedbackExample]) -> tuple[RunConfig, str]:
    """The configuration with ``balanced`` weights as numbers, and how the two classes stand to each other.

    A balanced weight makes all rows of its class together count as much as all of the other.

    Args:
        config: of a run of stage kto.
        rows: to train on.

    Example:
        30 good and 10 bad answers, ``kto_rejected_weight: balanced`` -> 3.
    """
    tuning = config.finetuning
    good = int(rows.selection.good.sum())
    bad = len(rows) - good
    weights = [tuning.kto_chosen_weight, tuning.kto_rejected_weight]
    told = f"feedback: {good:,} good and {bad:,} bad answers"
    if not good or not bad:
        alone = [1.0 if weight == "balanced" else weight for weight in weights]
        return _with_weights(config, *alone), f"{told}: nothing shows what is {'bad' if good else 'good'}"
    if weights[0] == "balanced":
        weights[0] = float(weights[1]) * bad / good
    if weights[1] == "balanced":
        weights[1] = float(weights[0]) * good / bad
    share = float(weights[0]) * good / (float(weights[1]) * bad)
    told += f" with weights {weights[0]:.4g} and {weights[1]:.4g}"
    if not _EVEN[0] - 0.01 <= share <= _EVEN[1] + 0.01:
        told += (
            f"; together the good ones count {share:.3g} times the bad ones, and 1 to 1.33 times is advised: set "
            f"{'kto_rejected_weight' if share > 1 else 'kto_chosen_weight'}: balanced"
        )
    return _with_weights(config, *weights), told


def _with_weights(config: RunConfig, good: float | str, bad: float | str) -> RunConfig:
    tuning = config.finetuning.model_copy(update={"kto_chosen_weight": good, "kto_rejected_weight": bad})
    return config.model_copy(update={"finetuning": tuning})

"""Reward models: of two answers to a prompt, the better one gets the higher score."""

from __future__ import annotations

import json

import torch

from tunesmith.losses.pairwise import pairwise_loss
from tunesmith.model.adapter import head_of
from tunesmith.model.heads import row_scores
from tunesmith.model.precision import autocast
from tunesmith.train.trainer import PeftTrainer
from tunesmith.types import Batch, LossOutput

SCORES = "eval_scores.jsonl"
"""Scores of the evaluation pairs, one line each, of the newest evaluation."""


class PairwisePeftTrainer(PeftTrainer):
    """Scores of both answers at their last token, compared pair by pair."""

    def compute_loss(self, batch: Batch) -> LossOutput:
        """Loss summed over the pairs; how often and by how much the better answer scores higher."""
        return self._outcome(*self._scores(batch), batch.margins_P)

    def prediction_step(self, batch: Batch) -> LossOutput:
        """The same, and the scores are kept."""
        chosen_P, rejected_P = self._scores(batch)
        sources = batch.sources[: len(chosen_P)]
        for source, chosen, rejected in zip(sources, chosen_P.tolist(), rejected_P.tolist(), strict=True):
            self._kept.append({"row": str(source), "chosen": chosen, "rejected": rejected})
        return self._outcome(chosen_P, rejected_P, batch.margins_P)

    def evaluate(self) -> dict[str, float]:
        """As every stage; the scores of all pairs are written beside the log."""
        self._kept: list[dict[str, str | float]] = []
        found = super().evaluate()
        lines = (json.dumps({"step": self.state.step, **entry}, ensure_ascii=False) + "\n" for entry in self._kept)
        scratch = self.given.run / f".{SCORES}.partial"
        scratch.write_text("".join(lines), encoding="utf-8")
        scratch.replace(self.given.run / SCORES)
        return found

    def _scores(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Rewards of the better and of the worse answers, float32 ``[P]`` each."""
        head = head_of(self.model)
        assert head is not None
        with autocast(self.given.device, self.given.compute_dtype):
            chosen_P, rejected_P = row_scores(self.given.forward, head, batch).chunk(2)
        return chosen_P, rejected_P

    def _outcome(self, chosen_P: torch.Tensor, rejected_P: torch.Tensor, margins_P: torch.Tensor | None) -> LossOutput:
        count = len(chosen_P)
        losses_P = pairwise_loss(chosen_P, rejected_P, self.given.finetuning.reward_centering, margins_P)
        chosen, rejected = chosen_P.detach(), rejected_P.detach()
        sums = torch.stack([(chosen > rejected).float().sum(), chosen.sum(), rejected.sum()]).tolist()
        named = dict(zip(("accuracy", "rewards/chosen", "rewards/rejected"), sums, strict=True))
        named["rewards/margins"] = sums[1] - sums[2]
        return LossOutput(losses_P.sum(), float(count), {name: (value, count) for name, value in named.items()})

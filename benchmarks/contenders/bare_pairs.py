"""Preferences and reward models from transformers and PEFT alone, padded. Shares no code with the package."""

from __future__ import annotations

import json
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch.nn.functional import logsigmoid
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from benchmarks.contenders.bare import Encoded, Updates, encode, lora, padded, serve
from benchmarks.contenders.pair_rows import conversations

BETA = 0.1
Sides = tuple[Encoded, Encoded]
"""The better and the worse answer, each behind the prompt."""


def encode_sides(tokenizer: Any, row: dict[str, Any], cutoff: int) -> Sides:
    """Both sides of a pair, each cut at its end."""
    prompt, better, worse = conversations(row)
    return encode(tokenizer, prompt + better, cutoff), encode(tokenizer, prompt + worse, cutoff)


class BarePairs(ABC):
    """LoRA on all linear layers; a batch is 2n rows, the better answers first.

    Args:
        folder: model folder.
        rows: pairs, taken in order, again from the start when they end.
        batch: pairs in a step.
        total_steps: of the schedule.
        rate: learning rate.
        dtype: of the model; what is trained is float32.
        seed: of the adapters.
        cutoff: longest row in tokens.
    """

    model: Any

    def __init__(
        self,
        folder: str,
        rows: list[dict[str, Any]],
        batch: int,
        total_steps: int,
        rate: float,
        dtype: torch.dtype = torch.float32,
        seed: int = 42,
        cutoff: int = 1 << 30,
    ) -> None:
        torch.manual_seed(seed)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.updates = Updates(self.load(folder, dtype), total_steps, rate)
        pairs = [pair for row in rows if (pair := self.encode(tokenizer, row, cutoff)) is not None]
        parts = [pairs[i : i + batch] for i in range(0, len(pairs), batch)]
        self.batches = [[better for better, _ in part] + [worse for _, worse in part] for part in parts]

    @abstractmethod
    def load(self, folder: str, dtype: torch.dtype) -> list[torch.nn.Parameter]:
        """Set ``model``; returns what is trained."""

    @abstractmethod
    def encode(self, tokenizer: Any, row: dict[str, Any], cutoff: int) -> Sides | None:
        """Both sides of a pair; None leaves it out."""

    @abstractmethod
    def loss(self, rows: list[Encoded]) -> torch.Tensor:
        """Mean over the pairs."""

    def real_tokens(self, index: int) -> int:
        """Tokens of a step, pads not counted."""
        return sum(len(ids) for ids, _ in self.batches[index % len(self.batches)])

    def step(self, index: int) -> tuple[float, float]:
        """One update; returns loss and gradient norm."""
        return self.updates.make(self.loss(self.batches[index % len(self.batches)]))


class BareDpo(BarePairs):
    """arXiv 2305.18290, eq. 7; the reference is the model without its adapters, asked in each step."""

    def load(self, folder: str, dtype: torch.dtype) -> list[torch.nn.Parameter]:
        """A language model."""
        self.model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), lora("CAUSAL_LM")).train()
        return [p for p in self.model.parameters() if p.requires_grad]

    def encode(self, tokenizer: Any, row: dict[str, Any], cutoff: int) -> Sides | None:
        """Cut at the end; left out where a side has no token of its answer."""
        sides = encode_sides(tokenizer, row, cutoff)
        return sides if all(any(label != -100 for label in labels) for _, labels in sides) else None

    def loss(self, rows: list[Encoded]) -> torch.Tensor:
        """``-log sigmoid`` of ``BETA`` times the difference of the answers' log-ratios."""
        inputs, mask, labels = padded(rows)
        policy = self.answer_logps(inputs, mask, labels)
        with torch.no_grad(), self.model.disable_adapter():
            reference = self.answer_logps(inputs, mask, labels)
        chosen, rejected = (policy - reference).chunk(2)
        return -logsigmoid(BETA * (chosen - rejected)).mean()

    def answer_logps(self, inputs: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Sum of each row's, from all logits."""
        logp = self.model(input_ids=inputs, attention_mask=mask).logits[:, :-1].float().log_softmax(-1)
        targets = labels[:, 1:]
        found = logp.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        return found.masked_fill(targets == -100, 0).sum(-1)


class BareReward(BarePairs):
    """arXiv 2203.02155, eq. 1; the score is a linear head, zero at first, on the last token's hidden state."""

    def load(self, folder: str, dtype: torch.dtype) -> list[torch.nn.Parameter]:
        """A decoder and a head."""
        decoder = AutoModel.from_pretrained(folder, dtype=dtype)
        self.model = get_peft_model(decoder, lora("FEATURE_EXTRACTION")).train()
        self.head = torch.nn.Linear(decoder.config.hidden_size, 1, bias=False)
        torch.nn.init.zeros_(self.head.weight)
        return [*(p for p in self.model.parameters() if p.requires_grad), self.head.weight]

    def encode(self, tokenizer: Any, row: dict[str, Any], cutoff: int) -> Sides | None:
        """Left out where a side is too long: the end of an answer is what is scored."""
        sides = encode_sides(tokenizer, row, cutoff + 1)
        return sides if all(len(ids) <= cutoff for ids, _ in sides) else None

    def loss(self, rows: list[Encoded]) -> torch.Tensor:
        """``-log sigmoid`` of the difference of the scores."""
        inputs, mask, _ = padded(rows)
        states = self.model(input_ids=inputs, attention_mask=mask, use_cache=False).last_hidden_state
        last = states[torch.arange(len(rows)), mask.sum(-1) - 1]
        chosen, rejected = self.head(last.float())[:, 0].chunk(2)
        return -logsigmoid(chosen - rejected).mean()


LOOPS: dict[str, type[BarePairs]] = {"dpo": BareDpo, "rm": BareReward}


def main() -> None:
    """The loop of the work unit's stage."""
    folder, rows, unit = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    serve(
        LOOPS[unit["settings"]["stage"]](
            folder,
            json.loads(rows.read_text(encoding="utf-8")),
            batch=unit["batch"],
            total_steps=unit["steps"],
            rate=unit["rate"],
            dtype=torch.bfloat16,
            cutoff=unit["cutoff"],
        )
    )


if __name__ == "__main__":
    main()

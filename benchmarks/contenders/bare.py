"""The reference: a padded training loop from transformers and PEFT alone. Shares no code with the package."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

Encoded = tuple[list[int], list[int]]
"""Ids and labels of a row."""


def turns(row: dict[str, str]) -> list[dict[str, str]]:
    """An alpaca row as a conversation."""
    question = "\n".join(part for part in (row["instruction"], row["input"]) if part)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]


def encode(tokenizer: Any, messages: list[dict[str, str]], cutoff: int) -> Encoded:
    """Ids and labels: all masked but the last answer, which is learned up to its end-of-turn token; the end is cut off."""
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=True, return_dict=False)
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    labels = [-100] * len(prompt) + ids[len(prompt) :]
    last = max(i for i, token in enumerate(ids) if token == tokenizer.eos_token_id)
    labels[last + 1 :] = [-100] * (len(ids) - last - 1)
    return ids[:cutoff], labels[:cutoff]


def padded(rows: list[Encoded]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, attention mask and labels ``[B, L]``, pads on the right."""
    longest = max(len(ids) for ids, _ in rows)
    pads = [longest - len(ids) for ids, _ in rows]
    inputs = torch.tensor([ids + [0] * pad for (ids, _), pad in zip(rows, pads, strict=True)])
    mask = torch.tensor([[1] * len(ids) + [0] * pad for (ids, _), pad in zip(rows, pads, strict=True)])
    labels = torch.tensor([row + [-100] * pad for (_, row), pad in zip(rows, pads, strict=True)])
    return inputs, mask, labels


def lora(task: str) -> LoraConfig:
    """The adapter of the work unit."""
    return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type=task)


class Updates:
    """AdamW, linear schedule, clipping at 1.

    Args:
        parameters: that are trained.
        total_steps: of the schedule.
        rate: learning rate.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], total_steps: int, rate: float) -> None:
        self.parameters = parameters
        self.optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
        self.schedule = get_scheduler("linear", self.optimizer, num_warmup_steps=0, num_training_steps=total_steps)

    def make(self, loss: torch.Tensor) -> tuple[float, float]:
        """One update; returns loss and gradient norm."""
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return loss.item(), norm.item()


class Loop(Protocol):
    """What makes updates."""

    def real_tokens(self, index: int) -> int:
        """Tokens of a step, pads not counted."""

    def step(self, index: int) -> tuple[float, float]:
        """One update; returns loss and gradient norm."""


class BareLoop:
    """LoRA on all linear layers.

    Args:
        folder: model folder.
        rows: alpaca rows, taken in order, again from the start when they end.
        batch: rows in a step.
        total_steps: of the schedule.
        rate: learning rate.
        dtype: of the model; adapters are float32.
        seed: of the adapters.
        cutoff: longest row in tokens.
        full: train all weights, kept in float32, under autocast to ``dtype``.
    """

    def __init__(
        self,
        folder: str,
        rows: list[dict[str, str]],
        batch: int,
        total_steps: int,
        rate: float,
        dtype: torch.dtype = torch.float32,
        seed: int = 42,
        cutoff: int = 1 << 30,
        full: bool = False,
    ) -> None:
        torch.manual_seed(seed)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32 if full else dtype)
        self.model = (model if full else get_peft_model(model, lora("CAUSAL_LM"))).train()
        self.autocast = torch.autocast("cpu", dtype, enabled=full and dtype != torch.float32)
        self.updates = Updates([p for p in self.model.parameters() if p.requires_grad], total_steps, rate)
        encoded = [encode(tokenizer, turns(row), cutoff) for row in rows]
        self.batches = [encoded[i : i + batch] for i in range(0, len(encoded), batch)]

    def real_tokens(self, index: int) -> int:
        """Tokens of a step, pads not counted."""
        return sum(len(ids) for ids, _ in self.batches[index % len(self.batches)])

    def step(self, index: int) -> tuple[float, float]:
        """One update; returns loss and gradient norm."""
        inputs, mask, labels = padded(self.batches[index % len(self.batches)])
        with self.autocast:
            loss = self.model(input_ids=inputs, attention_mask=mask, labels=labels).loss
        return self.updates.make(loss)


def serve(loop: Loop) -> None:
    """Answer each line with an update."""
    print(json.dumps({"ready": "bare"}), flush=True)
    for index, _ in enumerate(sys.stdin):
        began = time.perf_counter()
        loss, _ = loop.step(index)
        seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds, "tokens": loop.real_tokens(index), "loss": loss}), flush=True)


def main() -> None:
    """The loop of the work unit."""
    folder, rows, unit = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    serve(
        BareLoop(
            folder,
            json.loads(rows.read_text(encoding="utf-8")),
            batch=unit["batch"],
            total_steps=unit["steps"],
            rate=unit["rate"],
            dtype=torch.bfloat16,
            cutoff=unit["cutoff"],
            full=unit["settings"].get("finetuning_type") == "full",
        )
    )


if __name__ == "__main__":
    main()

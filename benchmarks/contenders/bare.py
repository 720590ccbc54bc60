"""The reference: a padded training loop from transformers and PEFT alone. Shares no code with the package."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler


def encode(tokenizer: Any, row: dict[str, str], cutoff: int) -> tuple[list[int], list[int]]:
    """Ids and labels of an alpaca row: prompt masked, the answer learned up to its end-of-turn token, the end cut off."""
    question = "\n".join(part for part in (row["instruction"], row["input"]) if part)
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
    prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, tokenize=True, return_dict=False)
    ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    labels = [-100] * len(prompt) + ids[len(prompt) :]
    last = max(i for i, token in enumerate(ids) if token == tokenizer.eos_token_id)
    labels[last + 1 :] = [-100] * (len(ids) - last - 1)
    return ids[:cutoff], labels[:cutoff]


class BareLoop:
    """LoRA on all linear layers, AdamW, linear schedule, clipping at 1.

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
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model = (model if full else get_peft_model(model, config)).train()
        self.autocast = torch.autocast("cpu", dtype, enabled=full and dtype != torch.float32)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=rate, weight_decay=0.0)
        self.schedule = get_scheduler("linear", self.optimizer, num_warmup_steps=0, num_training_steps=total_steps)
        encoded = [encode(tokenizer, row, cutoff) for row in rows]
        self.batches = [encoded[i : i + batch] for i in range(0, len(encoded), batch)]

    def real_tokens(self, index: int) -> int:
        """Tokens of a step, pads not counted."""
        return sum(len(ids) for ids, _ in self.batches[index % len(self.batches)])

    def step(self, index: int) -> tuple[float, float]:
        """One update; returns loss and gradient norm."""
        chosen = self.batches[index % len(self.batches)]
        longest = max(len(ids) for ids, _ in chosen)
        pads = [longest - len(ids) for ids, _ in chosen]
        inputs = torch.tensor([ids + [0] * pad for (ids, _), pad in zip(chosen, pads, strict=True)])
        labels = torch.tensor([row + [-100] * pad for (_, row), pad in zip(chosen, pads, strict=True)])
        mask = torch.tensor([[1] * len(ids) + [0] * pad for (ids, _), pad in zip(chosen, pads, strict=True)])
        with self.autocast:
            loss = self.model(input_ids=inputs, attention_mask=mask, labels=labels).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return loss.item(), norm.item()


def main() -> None:
    """Answer each line with an update."""
    folder, rows, unit = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    loop = BareLoop(
        folder,
        json.loads(rows.read_text(encoding="utf-8")),
        batch=unit["batch"],
        total_steps=unit["steps"],
        rate=unit["rate"],
        dtype=torch.bfloat16,
        cutoff=unit["cutoff"],
        full=unit["settings"].get("finetuning_type") == "full",
    )
    print(json.dumps({"ready": "bare"}), flush=True)
    for index, _ in enumerate(sys.stdin):
        began = time.perf_counter()
        loss, _ = loop.step(index)
        seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds, "tokens": loop.real_tokens(index), "loss": loss}), flush=True)


if __name__ == "__main__":
    main()

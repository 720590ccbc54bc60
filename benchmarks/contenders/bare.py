"""The reference: a padded training loop from transformers and PEFT alone. Shares no code with the package."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast, get_scheduler

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
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


def prepared(folder: str, dtype: torch.dtype, settings: Mapping[str, Any]) -> torch.nn.Module:
    """The model, made trainable."""
    kind, loading = settings.get("finetuning_type", "lora"), {}
    if bits := settings.get("quantization_bit"):
        rounded = {"load_in_8bit": True} if bits == 8 else {
            "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype,
            "bnb_4bit_use_double_quant": settings.get("double_quantization", True),
        }  # fmt: skip
        loading = {"quantization_config": BitsAndBytesConfig(**rounded), "device_map": {"": "cpu"}}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32 if kind == "full" else dtype, **loading)
    if kind == "full":
        return model
    if kind == "freeze":
        model.requires_grad_(False)
        for layer in model.model.layers[-settings["num_layer_trainable"] :]:
            layer.float().requires_grad_(True)
        return model
    experts = [name for name, parameter in model.named_parameters() if parameter.dim() == 3]
    config = lora("CAUSAL_LM")
    if experts:  # all linear layers would take the router, too, which ours leaves as it is
        config.target_modules, config.target_parameters = {"q_proj", "k_proj", "v_proj", "o_proj"}, experts
    config.lora_dropout, config.use_dora = settings.get("lora_dropout", 0.0), settings.get("use_dora", False)
    return get_peft_model(model, config)


class BareLoop:
    """Trained are LoRA adapters of all linear layers, or weights of the model, as ``settings`` say.

    Args:
        folder: model folder.
        rows: alpaca rows, taken in order, again from the start when they end.
        batch: rows in a step.
        total_steps: of the schedule.
        rate: learning rate.
        dtype: of the model; what is trained is float32, weights of the model under autocast to ``dtype``.
        seed: of the adapters.
        cutoff: longest row in tokens.
        settings: ``finetuning_type`` (``lora``, ``full``; ``freeze`` with ``num_layer_trainable``), ``lora_dropout``,
            ``use_dora``, ``quantization_bit`` (4 is nf4) and ``template``, a file, for a tokenizer without one; the meaning is
            that of tunesmith's keys.
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
        settings: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        torch.manual_seed(seed)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)  # of tokenizer.json alone, whatever the model's kind
        if "template" in settings:
            tokenizer.chat_template = Path(settings["template"]).read_text(encoding="utf-8")
        self.model = prepared(folder, dtype, settings).train()
        weights = settings.get("finetuning_type", "lora") != "lora"
        self.autocast = torch.autocast("cpu", dtype, enabled=weights and dtype != torch.float32)
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


def serve(loop: Loop, clock: Callable[[], float] = time.perf_counter) -> None:
    """Answer each line with an update."""
    print(json.dumps({"ready": "bare"}), flush=True)
    for index, _ in enumerate(sys.stdin):
        began = clock()
        loss, _ = loop.step(index)
        seconds = clock() - began
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
            dtype=DTYPES[unit["settings"].get("compute_dtype", "bf16")],
            seed=unit["settings"].get("seed", 42),
            cutoff=unit["cutoff"],
            settings=unit["settings"],
        ),
        time.process_time if unit.get("clock") == "cpu" else time.perf_counter,
    )


if __name__ == "__main__":
    main()

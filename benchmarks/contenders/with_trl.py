"""TRL's SFTTrainer; runs in an environment of its own, without tunesmith."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ANSWERS = os.dup(1)
os.dup2(2, 1)  # what it prints is no answer

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402


def answer(value: dict[str, Any]) -> None:
    """Send one line."""
    os.write(ANSWERS, (json.dumps(value) + "\n").encode())


class Turns(TrainerCallback):
    """Waits for a line before each update, and answers after it."""

    def __init__(self) -> None:
        self.tokens, self.began = 0, 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """All is loaded."""
        answer({"ready": "trl"})

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait."""
        if not sys.stdin.readline():
            control.should_training_stop = True
            os._exit(0)
        self.began = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """The update is done; its loss is known here."""
        if logs and "loss" in logs:
            answer({"seconds": time.perf_counter() - self.began, "tokens": self.tokens, "loss": logs["loss"]})


class Counting(SFTTrainer):
    """Counts the real tokens of a batch."""

    turns: Turns

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As it is."""
        mask = inputs.get("attention_mask")
        self.turns.tokens = int(mask.sum()) if mask is not None else inputs["input_ids"].numel()
        return super().compute_loss(model, inputs, *args, **kwargs)


def main() -> None:
    """Train on turns."""
    folder, rows, unit = sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")), json.loads(sys.argv[3])
    turns = Turns()
    data = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": "\n".join(part for part in (row["instruction"], row["input"]) if part)}],
                "completion": [{"role": "assistant", "content": row["output"]}],
            }
            for row in rows
        ]
    )
    with tempfile.TemporaryDirectory() as scratch:
        config = SFTConfig(
            output_dir=scratch, max_length=None if unit["padding_free"] else unit["cutoff"],
            per_device_train_batch_size=unit["batch"], max_steps=unit["steps"],
            learning_rate=unit["rate"], bf16=True, use_cpu=True, gradient_checkpointing=False, logging_steps=1,
            save_strategy="no", report_to="none", train_sampling_strategy="sequential", disable_tqdm=True,
            dataset_num_proc=1, packing=unit["packing"], padding_free=unit["padding_free"],
        )  # fmt: skip
        # padding-free batches need flash attention by name; SDPA honours position ids that start anew
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        trainer = Counting(
            model=model,
            args=config,
            train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(folder),
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[turns],
        )
        trainer.turns = turns
        trainer.train()


if __name__ == "__main__":
    main()

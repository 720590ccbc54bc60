"""What TRL's trainers need to take turns; runs in an environment of its own, without tunesmith."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ANSWERS = os.dup(1)
os.dup2(2, 1)  # what it prints is no answer

from transformers import TrainerCallback  # noqa: E402


def answer(value: dict[str, Any]) -> None:
    """Send one line."""
    os.write(ANSWERS, (json.dumps(value) + "\n").encode())


class Turns(TrainerCallback):
    """Waits for a line before each update, and answers after it."""

    def __init__(self) -> None:
        self.tokens, self.began = 0, 0.0
        self.ready: dict[str, Any] = {"ready": "trl"}

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """All is loaded."""
        answer(self.ready)

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


class Counting:
    """Counts the real tokens of a batch; goes before a trainer."""

    turns: Turns

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As it is."""
        mask = inputs.get("attention_mask")
        self.turns.tokens = int(mask.sum()) if mask is not None else inputs["input_ids"].numel()
        return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]


def common(unit: dict[str, Any], scratch: str) -> dict[str, Any]:
    """Settings of every trainer."""
    return {
        "output_dir": scratch, "per_device_train_batch_size": unit["batch"], "max_steps": unit["steps"],
        "learning_rate": unit["rate"], "bf16": True, "use_cpu": True, "gradient_checkpointing": False, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "train_sampling_strategy": "sequential", "disable_tqdm": True,
        "dataset_num_proc": 1,
    }  # fmt: skip

"""TRL's DPOTrainer and RewardTrainer."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.contenders.pair_rows import conversations
from benchmarks.contenders.trl_turns import Counting, Turns, common

# isort: split
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

TURNS = Turns()


class CountedDpo(Counting, DPOTrainer):
    """Takes turns; what is computed once before the first update is timed."""

    turns = TURNS

    def _precompute_ref_logps(self, dataset: Any, *args: Any) -> Any:
        began = time.perf_counter()
        found = super()._precompute_ref_logps(dataset, *args)
        self.turns.ready |= {"once": time.perf_counter() - began, "pairs": len(found)}
        return found


class CountedReward(Counting, RewardTrainer):
    """Takes turns."""

    turns = TURNS


def main() -> None:
    """Train on turns."""
    folder, rows, unit = sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")), json.loads(sys.argv[3])
    data = Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), conversations(row), strict=True)) for row in rows])
    scores = unit["settings"]["stage"] == "rm"
    with tempfile.TemporaryDirectory() as scratch:
        settings = {**common(unit, scratch), "max_length": unit["cutoff"]}
        if scores:
            model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.bfloat16)
            torch.nn.init.zeros_(model.score.weight)  # as ours begins
            config = RewardConfig(**settings)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
            config = DPOConfig(**settings, precompute_ref_log_probs=unit["precompute"])
        trainer = (CountedReward if scores else CountedDpo)(
            model=model,
            args=config,
            train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(folder),
            peft_config=LoraConfig(
                r=8, lora_alpha=16, target_modules="all-linear", task_type="SEQ_CLS" if scores else "CAUSAL_LM"
            ),
            callbacks=[TURNS],
        )
        trainer.train()


if __name__ == "__main__":
    main()

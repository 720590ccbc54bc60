"""TRL's SFTTrainer."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from benchmarks.contenders.trl_turns import Counting, Turns, common

# isort: split
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer


class Counted(Counting, SFTTrainer):
    """Takes turns."""


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
        length = None if unit["padding_free"] else unit["cutoff"]
        kind = {"packing": unit["packing"], "padding_free": unit["padding_free"], "max_length": length}
        # padding-free batches need flash attention by name; SDPA honours position ids that start anew
        trainer = Counted(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16),
            args=SFTConfig(**common(unit, scratch), **kind),
            train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(folder),
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[turns],
        )
        trainer.turns = turns
        trainer.train()


if __name__ == "__main__":
    main()

"""``python -m benchmarks [--steps N] [--data FILE]``: supervised fine-tuning against the bare loop, by turns.

Work unit: SmolLM2-135M, LoRA rank 8 on all linear layers, bf16, batch 4, cutoff 1024, rows in file order. Both sides
train on the same rows; their steps alternate, so that a slow moment of the machine hits both. Prints medians, the
ratio of real tokens a second, and the difference of the losses.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

from benchmarks import ROOT
from benchmarks.bare import BareLoop
from tunesmith.config.load import load_config
from tunesmith.model.builtin import fetch
from tunesmith.stages.run import build_trainer
from tunesmith.train.progress import SilentReporter

WARM_UP = 3


def main() -> None:
    """Run the work unit and print what was measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("--steps", type=int, default=12, help="measured steps of each side")
    parser.add_argument("--data", type=Path, default=ROOT / "examples/data/general.jsonl", help="alpaca rows, .json or .jsonl")
    parser.add_argument("--model", help="model folder; the built-in model if unset")
    args = parser.parse_args()
    text = args.data.read_text(encoding="utf-8")
    rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines() if line]
    total = WARM_UP + args.steps
    rows = [rows[i % len(rows)] for i in range(4 * total)]
    folder = args.model or str(fetch("smollm2-135m"))

    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch)
        (data / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
        (data / "dataset_info.json").write_text('{"rows": {"file_name": "rows.json"}}', encoding="utf-8")
        settings = {
            "model_name_or_path": folder, "dataset_dir": scratch, "dataset": "rows", "output_dir": f"{scratch}/run",
            "compute_dtype": "bf16", "per_device_train_batch_size": 4, "cutoff_len": 1024, "learning_rate": 1e-4,
            "max_steps": total, "disable_shuffling": True, "truncation": "keep_start",
        }  # fmt: skip
        config, _ = load_config(None, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
        ours, _ = build_trainer(config, SilentReporter())
    theirs = BareLoop(folder, rows, batch=4, total_steps=total, rate=1e-4, dtype=torch.bfloat16, cutoff=1024)

    ours.model.train()
    seconds: dict[str, list[float]] = {"tunesmith": [], "bare": []}
    losses: dict[str, list[float]] = {"tunesmith": [], "bare": []}
    tokens = []
    for index, window in enumerate(ours.loader.windows(0)):
        began = time.perf_counter()
        result = ours.training_step(window)
        middle = time.perf_counter()
        loss, _ = theirs.step(index)
        ended = time.perf_counter()
        assert result.num_tokens == theirs.real_tokens(index), "the two sides train on different rows"
        if index >= WARM_UP:
            seconds["tunesmith"].append(middle - began)
            seconds["bare"].append(ended - middle)
            losses["tunesmith"].append(result.loss_sum / result.count)
            losses["bare"].append(loss)
            tokens.append(result.num_tokens)

    ratios = [bare / mine for mine, bare in zip(seconds["tunesmith"], seconds["bare"], strict=True)]
    gaps = [abs(a - b) / b for a, b in zip(losses["tunesmith"], losses["bare"], strict=True)]
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()}"
    print(f"{date.today()}  torch {torch.__version__}, {threads} on {platform.machine()}")
    print(f"{args.data.name}: {args.steps} steps, {sum(tokens)} real tokens")
    for name, times in seconds.items():
        print(f"{name:10} {sum(tokens) / sum(times):7.0f} tokens/s, median step {statistics.median(times):.3f} s, "
              f"mean loss {statistics.mean(losses[name]):.4f}")  # fmt: skip
    print(f"ratio      {statistics.median(ratios):.2f} (median of steps); losses differ by {max(gaps):.1%} at most")


if __name__ == "__main__":
    main()

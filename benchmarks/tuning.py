"""``python -m benchmarks.tuning [--data DIR] [--dataset NAME] [--steps 20]``: every tuning type and quantisation, side by side.

Each runs in a process of its own on the built-in model: the same rows, the same number of updates. Printed is a Markdown
table of trained parameters, the loss of 32 held-out rows before and after, peak memory and real tokens a second.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import ROOT

KINDS: dict[str, dict[str, Any]] = {
    "full": {"finetuning_type": "full", "learning_rate": 2e-5},
    "freeze, last 2 layers": {"finetuning_type": "freeze", "num_layer_trainable": 2, "learning_rate": 1e-4},
    "freeze, first 2 layers": {"finetuning_type": "freeze", "num_layer_trainable": -2, "learning_rate": 1e-4},
    "lora": {},
    "lora, rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "PiSSA": {"pissa_init": True, "learning_rate": 1e-4},
    "lora on nf4": {"quantization_bit": 4, "double_quantization": False},
    "lora on nf4, double": {"quantization_bit": 4},
    "lora on fp4": {"quantization_bit": 4, "quantization_type": "fp4"},
    "lora on int8": {"quantization_bit": 8},
}


def main() -> None:
    """Measure and print; with ``--one`` train once in this process."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tuning")
    parser.add_argument("--data", type=Path, default=ROOT / "examples/data", help="folder of dataset_info.json")
    parser.add_argument("--dataset", default="general")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(_train(args.one)))
        return
    print("| tuning | trained | held-out loss before | after | peak MiB | tokens/s |\n|---|---|---|---|---|---|")
    for name in args.only:
        with tempfile.TemporaryDirectory() as scratch:
            config = Path(scratch) / "config.yaml"
            config.write_text(json.dumps(_settings(args, Path(scratch)) | KINDS[name]), encoding="utf-8")
            command = [sys.executable, "-m", "benchmarks.tuning", "--one", str(config)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        print(f"| {name} | {found['trained']:,} | {found['before']:.3f} | {found['after']:.3f} | {found['peak']:,.0f} "
              f"| {found['speed']:.0f} |", flush=True)  # fmt: skip


def _settings(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    return {
        "model_name_or_path": "builtin:smollm2-135m", "dataset": args.dataset, "dataset_dir": str(args.data.resolve()),
        "output_dir": str(scratch / "run"), "max_steps": args.steps, "per_device_train_batch_size": 4, "cutoff_len": 512,
        "learning_rate": 5e-4, "warmup_steps": 3, "save_strategy": "no", "plot_loss": False, "val_size": 32,
        "eval_on_start": True, "eval_steps": args.steps,
    }  # fmt: skip


def _train(config: Path) -> dict[str, float]:
    from tunesmith.config.load import load_config
    from tunesmith.model.adapter import count_parameters
    from tunesmith.stages.run import build_trainer
    from tunesmith.train.progress import SilentReporter

    settings, _ = load_config(config)
    trainer, _ = build_trainer(settings, SilentReporter())
    trainer.given.run.mkdir(parents=True)
    trainer.train()
    lines = (trainer.given.run / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()
    log = [json.loads(line) for line in lines]
    held_out = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    return {
        "trained": count_parameters(trainer.model)[0],
        "before": held_out[0],
        "after": held_out[-1],
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "speed": statistics.median(entry["tokens_per_second"] for entry in log[2:] if "tokens_per_second" in entry),
    }


if __name__ == "__main__":
    main()

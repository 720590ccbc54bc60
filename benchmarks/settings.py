"""``python -m benchmarks.settings --data FILE [--only NAME ...] [--write]``: every setting against the bare loop, by turns.

Rows of SmolLM2 have the work unit of ``benchmarks/sft.py``; what a row changes is changed on both sides. The small models
(``--models DIR``, as in ``../shared``) have a vocabulary of 512, so the same rows are longer there: they are cut at 512 tokens.
Printed are real tokens a second, the ratio (median of updates), both peaks, and by how much losses differ; a ratio below 1 is
marked. The clock is the processor's, one thread, so other processes count little.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.machine import facts
from benchmarks.report import loss_gap, read_rows, times_faster, write_rows
from benchmarks.sft import WARM_UP
from benchmarks.turns import contender, take_turns
from tunesmith.model.builtin import fetch

TUNING: dict[str, dict[str, Any]] = {
    "lora": {},
    "full": {"finetuning_type": "full"},
    "freeze, last 2 layers": {"finetuning_type": "freeze", "num_layer_trainable": 2},
    "DoRA": {"use_dora": True},
    "lora on nf4": {"quantization_bit": 4},
    "lora on int8": {"quantization_bit": 8},
    "lora, dropout 0.1": {"lora_dropout": 0.1},
    "lora, fp32": {"compute_dtype": "fp32"},
    "lora, packed": {"packing": True},
}
NOT_IN_BF16 = ("stories260K-mixtral",)
"""The bare loop stops there: its experts have 172 rows, and torch's grouped products in 16 bits need a multiple of 8."""
QUESTION = 300
"""Characters of a question at most: of longer ones a small model would see no answer."""
SMALL = ("stories260K", *(f"stories260K-{kind}" for kind in ("mistral", "qwen2", "phi3", "gemma", "mixtral")))
TEMPLATE = (
    "{% for message in messages %}{{ message.role + ': ' + message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
"""For tokenizers without one."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.settings")
    parser.add_argument("--data", type=Path, default=ROOT / "examples/data/general.jsonl", help="alpaca rows, .json or .jsonl")
    parser.add_argument("--models", type=Path, help="folder of the small models; without it they are left out")
    parser.add_argument("--steps", type=int, default=6, help="measured updates of SmolLM2; five times as many of a small model")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--only", nargs="+", help="names of rows, or parts of them")
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results/")
    args = parser.parse_args()
    machine = facts(1)
    print("| setting | ours, tokens/s | bare, tokens/s | ours is faster | ours, MiB | bare, MiB | share | loss gap |")
    print("|---" * 8 + "|")
    with tempfile.TemporaryDirectory() as scratch:
        for name, model, cutoff, settings in _cases(args, Path(scratch)):
            if args.only is None or any(part in name for part in args.only):
                steps = args.steps if cutoff == 1024 else 5 * args.steps
                row = _measure(args, Path(scratch) / "rows.json", name, model, cutoff, steps, settings)
                if args.write:
                    _keep(machine, {"data": args.data.name, "batch": args.batch, "cutoff": cutoff, "updates": steps}, row)
                print(f"| {name} | {row['ours']:.0f} | {row['bare']:.0f} | {row['ratio']:.2f}{' *' * (row['ratio'] < 1)} "
                      f"| {row['peak']:,.0f} | {row['bare_peak']:,.0f} | {row['peak'] / row['bare_peak']:.2f} "
                      f"| {row['gap']} |", flush=True)  # fmt: skip
    if args.write:
        print(f"kept in {_result(machine).relative_to(ROOT)}")


def _keep(machine: dict[str, Any], unit: dict[str, Any], row: dict[str, Any]) -> None:
    """Write a row down, in place of an earlier one of its name."""
    target = _result(machine)
    before = json.loads(target.read_text(encoding="utf-8"))["result"] if target.exists() else []
    table = [other for other in before if other["name"] != row["name"]] + [{**row, **unit}]
    target.write_text(json.dumps({"machine": machine, "result": table}, indent=1) + "\n", encoding="utf-8")


def _result(machine: dict[str, Any]) -> Path:
    return ROOT / "benchmarks/results" / f"{machine['date']}-settings.json"


def _cases(args: argparse.Namespace, scratch: Path) -> list[tuple[str, str, int, dict[str, Any]]]:
    """(name, model folder, cutoff, settings) of each row."""
    smollm = str(fetch("smollm2-135m"))
    found = [(name, smollm, 1024, settings) for name, settings in TUNING.items()]
    if args.models is not None:
        template = scratch / "template.jinja"
        template.write_text(TEMPLATE, encoding="utf-8")
        for kind in ("lora", "full"):
            for name in SMALL:
                dtype = "fp32" if name in NOT_IN_BF16 else "bf16"
                settings = {"finetuning_type": kind, "template": str(template), "compute_dtype": dtype}
                found.append((f"{name}, {kind}, {dtype}", str(args.models / name), 512, settings))
    return found


def _measure(
    args: argparse.Namespace, file: Path, name: str, model: str, cutoff: int, steps: int, settings: dict[str, Any]
) -> dict[str, Any]:
    packed = settings.get("packing", False)
    rounds = WARM_UP + steps
    rows = [row for row in read_rows(args.data) if len(row["instruction"] + row["input"]) <= QUESTION]
    write_rows(file, rows, (4 if packed else 1) * args.batch * rounds)
    unit = {"batch": args.batch, "cutoff": cutoff, "rate": 1e-4, "steps": rounds + 1, "clock": "cpu", "settings": settings}
    given = [model, str(file), json.dumps(unit)]
    ours, bare = contender("tunesmith", "ours", given), contender("bare", "bare", given)
    peaks = take_turns([ours, bare], WARM_UP, steps, threads=1)
    assert packed or ours.tokens == bare.tokens, f"{name}: the two were given different rows"
    return {
        "name": name,
        "ours": round(ours.speed, 1),
        "bare": round(bare.speed, 1),
        "ratio": round(ours.speed / bare.speed if packed else times_faster(ours.seconds, bare.seconds), 3),
        "peak": round(peaks["tunesmith"]),
        "bare_peak": round(peaks["bare"]),
        "gap": "other rows" if packed else f"{loss_gap(ours, bare):.1e}",
    }


if __name__ == "__main__":
    main()

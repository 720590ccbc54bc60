"""Supervised fine-tuning against other trainers, by turns: ``python -m benchmarks sft --against bare,trl``.

Work unit: SmolLM2-135M, LoRA rank 8 on all linear layers, bf16, batch 4, cutoff 1024, rows in file order, no recomputation.
Every trainer is a process of its own and makes one update in each round. Printed are real tokens a second (pads do not count),
the ratio (median of rounds where the rows are the same, of totals where they are not), the highest memory of the process,
the share of the machine's bf16 product rate by ``4 x parameters x real tokens`` (forward and input gradient of frozen weights;
6 where all are trained), and how far losses are apart on the same rows.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.machine import facts, gemm_rate, median
from benchmarks.turns import Contender, contender, take_turns, trl_python
from tunesmith.model.builtin import fetch

PARAMETERS = 134_515_008
"""Of the model, the tied matrix of embedding and head once: it is a product in the head only."""
WARM_UP = 2
OTHERS = ("bare", "trl", "trl-padding-free", "trl-packed")


def main(arguments: list[str]) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks sft", description=__doc__)
    parser.add_argument("--against", default="bare", help=f"of {', '.join(OTHERS)}; comma-separated")
    parser.add_argument("--steps", type=int, default=12, help="measured updates of each")
    parser.add_argument("--data", type=Path, default=ROOT / "examples/data/general.jsonl", help="alpaca rows, .json or .jsonl")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--cutoff", type=int, default=1024)
    parser.add_argument("--packed", action="store_true", help="ours in packs of --cutoff tokens, --batch of them an update")
    parser.add_argument("--full", action="store_true", help="train all weights (bare only)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", help="model folder; the built-in model if unset")
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results/")
    args = parser.parse_args(arguments)
    unknown = set(args.against.split(",")) - set(OTHERS)
    if unknown:
        parser.error(f"--against: no such contender: {', '.join(unknown)}; there are {', '.join(OTHERS)}")
    with tempfile.TemporaryDirectory() as scratch:
        rows = _rows(args.data, 4 * args.batch * (WARM_UP + args.steps))
        file = Path(scratch) / "rows.json"
        file.write_text(json.dumps(rows), encoding="utf-8")
        contenders = _contenders(args, file)
        peaks = take_turns(contenders, WARM_UP, args.steps, args.threads)
    machine = {**facts(args.threads), "bf16_products_per_second": gemm_rate(args.threads)}
    table = _table(contenders, peaks, machine["bf16_products_per_second"], args)
    for key, value in machine.items():
        print(f"{key}: {value}")
    print("\n".join(_lines(table)))
    if args.write:
        unit = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        target = ROOT / "benchmarks/results" / f"{machine['date']}-sft-{'-'.join(row['name'] for row in table[1:])}.json"
        target.parent.mkdir(exist_ok=True)
        unit["data"] = args.data.name
        target.write_text(json.dumps({"machine": machine, "unit": unit, "result": table}, indent=1) + "\n", encoding="utf-8")
        print(f"kept in {target.relative_to(ROOT)}")


def _rows(file: Path, count: int) -> list[dict[str, str]]:
    text = file.read_text(encoding="utf-8")
    rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines() if line]
    return [rows[i % len(rows)] for i in range(count)]


def _contenders(args: argparse.Namespace, file: Path) -> list[Contender]:
    model = args.model or str(fetch("smollm2-135m"))
    unit: dict[str, Any] = {
        "batch": args.batch, "cutoff": args.cutoff, "rate": 1e-4, "steps": WARM_UP + args.steps + 1, "packing": False,
        "padding_free": False, "settings": {"finetuning_type": "full"} if args.full else {},
    }  # fmt: skip

    def arguments(**changes: Any) -> list[str]:
        return [model, str(file), json.dumps(unit | changes)]

    name = "tunesmith, packed" if args.packed else "tunesmith"
    found = [contender(name, "ours", arguments(settings={**unit["settings"], "packing": args.packed}))]
    for other in args.against.split(","):
        if other == "bare":
            found.append(contender("bare", "bare", arguments()))
        else:
            kind = {"packing": other == "trl-packed", "padding_free": other == "trl-padding-free"}
            if other == "trl-packed" and not args.packed:  # one pack has about as many tokens as four rows
                kind["batch"] = max(args.batch // 4, 1)
            found.append(contender(other, "with_trl", arguments(**kind), trl_python()))
    return found


def _table(contenders: list[Contender], peaks: dict[str, float], rate: float, args: argparse.Namespace) -> list[dict[str, Any]]:
    ours, table = contenders[0], []
    operations = (6 if args.full else 4) * PARAMETERS
    for one in contenders:
        same = one.tokens == ours.tokens
        ratios = [other / mine for mine, other in zip(ours.seconds, one.seconds, strict=True)]
        gaps = [abs(a - b) / b for a, b in zip(ours.losses, one.losses, strict=True)]
        table.append({
            "name": one.name,
            "tokens_per_second": round(one.speed, 1),
            "ours_is_faster_by": round(median(ratios) if same else ours.speed / one.speed, 3),
            "peak_mib": round(peaks[one.name]),
            "our_share_of_peak": round(peaks[ours.name] / peaks[one.name], 3),
            "share_of_product_rate": round(operations * one.speed / rate, 4),
            "tokens_per_update": round(sum(one.tokens) / len(one.tokens)),
            "mean_loss": round(sum(one.losses) / len(one.losses), 4),
            "largest_loss_gap": round(max(gaps), 4) if same else None,
        })  # fmt: skip
    return table


def _lines(table: list[dict[str, Any]]) -> list[str]:
    heads = {
        "name": "trainer",
        "tokens_per_second": "real tokens/s",
        "ours_is_faster_by": "ours is faster by",
        "peak_mib": "peak MiB",
        "our_share_of_peak": "our share of that",
        "share_of_product_rate": "of product rate",
        "tokens_per_update": "tokens/update",
        "mean_loss": "mean loss",
        "largest_loss_gap": "loss gap",
    }
    lines = ["| " + " | ".join(heads.values()) + " |", "|---" * len(heads) + "|"]
    return lines + ["| " + " | ".join("" if row[key] is None else str(row[key]) for key in heads) + " |" for row in table]

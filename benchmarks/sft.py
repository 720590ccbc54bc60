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
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.report import loss_gap, machine, measure, options, parse, publish, times_faster
from benchmarks.turns import Contender, contender, trl_python

PARAMETERS = 134_515_008
"""Of the model, the tied matrix of embedding and head once: it is a product in the head only."""
WARM_UP = 2
OTHERS = ("bare", "trl", "trl-padding-free", "trl-packed")
HEADS = {
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


def main(arguments: list[str]) -> None:
    """Measure and print."""
    parser = options("sft", __doc__, OTHERS)
    parser.add_argument("--data", type=Path, default=ROOT / "examples/data/general.jsonl", help="alpaca rows, .json or .jsonl")
    parser.add_argument("--packed", action="store_true", help="ours in packs of --cutoff tokens, --batch of them an update")
    parser.add_argument("--full", action="store_true", help="train all weights (bare only)")
    args = parse(parser, arguments, OTHERS)
    rows = 4 * args.batch * (WARM_UP + args.steps)
    contenders, peaks = measure(args, lambda file: _contenders(args, file), rows, WARM_UP)
    where = machine(args.threads)
    publish("sft", args, where, _table(contenders, peaks, where["bf16_products_per_second"], args), HEADS)


def _contenders(args: argparse.Namespace, file: Path) -> list[Contender]:
    unit: dict[str, Any] = {
        "batch": args.batch, "cutoff": args.cutoff, "rate": 1e-4, "steps": WARM_UP + args.steps + 1, "packing": False,
        "padding_free": False, "settings": {"finetuning_type": "full"} if args.full else {},
    }  # fmt: skip

    def arguments(**changes: Any) -> list[str]:
        return [args.model, str(file), json.dumps(unit | changes)]

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
        table.append({
            "name": one.name,
            "tokens_per_second": round(one.speed, 1),
            "ours_is_faster_by": round(times_faster(ours.seconds, one.seconds) if same else ours.speed / one.speed, 3),
            "peak_mib": round(peaks[one.name]),
            "our_share_of_peak": round(peaks[ours.name] / peaks[one.name], 3),
            "share_of_product_rate": round(operations * one.speed / rate, 4),
            "tokens_per_update": round(sum(one.tokens) / len(one.tokens)),
            "mean_loss": round(sum(one.losses) / len(one.losses), 4),
            "largest_loss_gap": round(loss_gap(ours, one), 4) if same else None,
        })  # fmt: skip
    return table

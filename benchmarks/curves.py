"""``python -m benchmarks.curves [--data FILE] [--steps 100] [--write]``: curves in bf16 against seeds of the bare loop.

Ours, the bare loop from the same initial adapter, and the bare loop from those of other seeds train on the same rows in the
same order. By how much seeds differ is what rounding may cost: ours is compared with the first as the others are. Behind
the last update the learning rate is 0, so the losses of the ``HELD_OUT`` batches that follow are held-out losses of the final
weights.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.machine import facts
from benchmarks.report import read_rows, write_rows
from benchmarks.turns import Contender, contender, take_turns
from tunesmith.model.builtin import fetch

HELD_OUT = 8
SMOOTHED = 10
"""Updates in the mean that smooths a curve."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curves")
    parser.add_argument("--data", type=Path, default=ROOT / "examples/data/general.jsonl", help="alpaca rows, .json or .jsonl")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--cutoff", type=int, default=512)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44], help="ours starts from the first")
    parser.add_argument("--write", action="store_true", help="keep the curves in benchmarks/results/")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "rows.json"
        write_rows(file, read_rows(args.data), args.batch * (args.steps + HELD_OUT))
        runs = _contenders(args, file)
        take_turns(runs, 0, args.steps + HELD_OUT, threads=1)
    ours, *bare = ([round(loss, 6) for loss in run.losses] for run in runs)
    result = {
        "tunesmith against bare": compare(ours, bare[0], args.steps),
        **{
            f"{run.name}, against bare": compare(curve, bare[0], args.steps)
            for run, curve in zip(runs[2:], bare[1:], strict=True)
        },
        "held-out loss": {run.name: round(sum(run.losses[args.steps :]) / HELD_OUT, 4) for run in runs},
    }
    print(json.dumps(result, indent=1))
    if args.write:
        machine = facts(1)
        unit = {key: getattr(args, key) for key in ("steps", "batch", "cutoff", "rate", "seeds")} | {"data": args.data.name}
        target = ROOT / "benchmarks/results" / f"{machine['date']}-curves.json"
        curves = {run.name: [round(loss, 4) for loss in run.losses] for run in runs}
        whole = {"machine": machine, "unit": unit, "result": result, "curves": curves}
        target.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        print(f"kept in {target.relative_to(ROOT)}")


def compare(curve: list[float], reference: list[float], steps: int) -> dict[str, dict[str, float]]:
    """Largest and mean difference of the first ``steps`` losses, update by update and of their moving means."""
    found = {}
    for name, width in (("per update", 1), (f"means of {SMOOTHED}", SMOOTHED)):
        gaps = [abs(a - b) for a, b in zip(_smooth(curve[:steps], width), _smooth(reference[:steps], width), strict=True)]
        found[name] = {"largest": round(max(gaps), 5), "mean": round(sum(gaps) / len(gaps), 5)}
    return found


def _smooth(values: list[float], width: int) -> list[float]:
    return [sum(values[i : i + width]) / width for i in range(len(values) - width + 1)]


def _contenders(args: argparse.Namespace, file: Path) -> list[Contender]:
    unit: dict[str, Any] = {"batch": args.batch, "cutoff": args.cutoff, "rate": args.rate, "steps": args.steps}
    model = str(fetch("smollm2-135m"))

    def given(seed: int) -> list[str]:
        return [model, str(file), json.dumps({**unit, "settings": {"seed": seed}})]

    bare = [contender(f"bare, seed {seed}", "bare", given(seed)) for seed in args.seeds]
    return [contender(f"tunesmith, seed {args.seeds[0]}", "ours", given(args.seeds[0])), *bare]


if __name__ == "__main__":
    main()

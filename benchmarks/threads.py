"""``python -m benchmarks.threads [--data FILE] [--threads 1 2]``: the same updates with several numbers of threads, by turns.

Meaningful on an otherwise idle machine only: the load before the run is printed. Work unit as in ``benchmarks/sft.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

from benchmarks import ROOT
from benchmarks.report import read_rows, times_faster, write_rows
from benchmarks.sft import WARM_UP
from benchmarks.turns import contender, take_turns
from tunesmith.model.builtin import fetch


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.threads")
    parser.add_argument("--data", type=Path, default=ROOT / "examples/data/general.jsonl", help="alpaca rows, .json or .jsonl")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="the first is what the others are compared with")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("keys", nargs="*", metavar="KEY=VALUE", help="of tunesmith, such as finetuning_type=full")
    args = parser.parse_args()
    unit = {"batch": args.batch, "cutoff": 1024, "rate": 1e-4, "steps": WARM_UP + args.steps + 1,
            "settings": dict(key.split("=", 1) for key in args.keys)}  # fmt: skip
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "rows.json"
        write_rows(file, read_rows(args.data), args.batch * (WARM_UP + args.steps))
        given = [str(fetch("smollm2-135m")), str(file), json.dumps(unit)]
        runs = [contender(f"{threads} threads", "ours", given) for threads in args.threads]
        for run, threads in zip(runs, args.threads, strict=True):
            run.threads = threads
        peaks = take_turns(runs, WARM_UP, args.steps, args.threads[0])
    print(f"{os.cpu_count()} cores, load before {load:.2f}")
    print("| threads | real tokens/s | times the first | peak MiB |\n|---|---|---|---|")
    for run in runs:
        print(
            f"| {run.threads} | {run.speed:.0f} | {times_faster(run.seconds, runs[0].seconds):.2f} | {peaks[run.name]:,.0f} |"
        )


if __name__ == "__main__":
    main()

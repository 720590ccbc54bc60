"""Generation against the library's, by turns: ``python -m benchmarks rollout --data FILE [--samples N] [--write]``.

Work unit: SmolLM2-135M in bf16, sampled answers to the first prompts of a file of alpaca rows, with a LoRA adapter of rank 8
and without. The other one is ``generate`` of transformers (and PEFT) on one left-padded batch, in which rows that are done are
kept until the last one is. Each is a process of its own and answers all prompts in each round. Printed are tokens of answers a
second (median of rounds), the ratio, and the highest memory of the process. ``--clock cpu`` counts time of the processor, for
one thread on a machine that does other things, too.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.machine import median
from benchmarks.report import machine, publish, read_rows, write_rows
from benchmarks.turns import Contender, contender, take_turns
from tunesmith.model.builtin import fetch

HEADS = {
    "name": "engine",
    "adapter": "adapter",
    "tokens_per_second": "tokens/s",
    "ours_is_faster_by": "ours is faster by",
    "peak_mib": "peak MiB",
    "tokens_per_round": "tokens/round",
}


def main(arguments: list[str]) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks rollout", description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT / "examples/data/general.jsonl", help="alpaca rows, .json or .jsonl")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=1, help="answers to each prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens of an answer, at most")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds of each")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--model", help="model folder; the built-in model if unset")
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results/")
    args = parser.parse_args(arguments)
    args.model, args.against = args.model or str(fetch("smollm2-135m")), "generate"
    table = []
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch) / "rows.json"
        write_rows(rows, read_rows(args.data), args.prompts)
        for adapter in (True, False):
            pair = [_contender(args, rows, engine, adapter) for engine in ("ours", "generate")]
            peaks = take_turns(pair, 1, args.rounds, args.threads)
            table += [_line(one, pair[0], adapter, peaks[one.name]) for one in pair]
    publish("rollout", args, machine(args.threads), table, HEADS)


def _contender(args: argparse.Namespace, rows: Path, engine: str, adapter: bool) -> Contender:
    unit: dict[str, Any] = {
        "engine": engine, "lora": adapter, "new": args.new, "samples": args.samples, "top_k": args.top_k, "top_p": args.top_p,
        "clock": args.clock,
    }  # fmt: skip
    return contender(engine, "rollouts", [args.model, str(rows), json.dumps(unit)])


def _line(one: Contender, ours: Contender, adapter: bool, peak: float) -> dict[str, Any]:
    return {
        "name": "tunesmith" if one is ours else one.name,
        "adapter": "LoRA, rank 8" if adapter else "none",
        "tokens_per_second": round(_speed(one), 1),
        "ours_is_faster_by": round(_speed(ours) / _speed(one), 2),
        "peak_mib": round(peak),
        "tokens_per_round": round(sum(one.tokens) / len(one.tokens)),
    }


def _speed(one: Contender) -> float:
    return median([tokens / seconds for tokens, seconds in zip(one.tokens, one.seconds, strict=True)])

"""Preferences and reward models against other trainers, by turns: ``python -m benchmarks dpo|rm --data FILE``.

Work unit: SmolLM2-135M, LoRA rank 8 on all linear layers, bf16, batch 4 (pairs), cutoff 1024, pairs in file order, no
recomputation. Every trainer is a process of its own and makes one update in each round. Pairs of which an answer is cut off
whole (dpo) or in part (rm) are left out by all. Printed are pairs and real tokens a second (the prompt of a pair counts twice,
pads do not count), the ratio (median of rounds), the highest memory of the process and how far losses are apart, then the share
of tokens that stand before the place where the answers of a pair part. Log-probabilities of a reference that are computed once
are part of the time: each pair's share of that pass in a run of one epoch. Updates alone are in columns of their own.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.report import loss_gap, machine, measure, options, parse, publish, times_faster
from benchmarks.turns import Contender, contender, trl_python

WARM_UP = 1
SETTINGS: dict[str, dict[str, Any]] = {
    "dpo": {"stage": "dpo"},
    "rm": {"stage": "rm", "truncation": "drop"},  # the end of an answer is what is scored
}
RATES = {"dpo": 1e-5, "rm": 1e-4}
OTHERS = {"dpo": ("bare", "trl", "trl-precomputed"), "rm": ("bare", "trl")}
HEADS = {
    "name": "trainer",
    "pairs_per_second": "pairs/s",
    "tokens_per_second": "real tokens/s",
    "ours_is_faster_by": "ours is faster by",
    "updates_pairs_per_second": "updates alone: pairs/s",
    "updates_ours_is_faster_by": "ours is faster by",
    "peak_mib": "peak MiB",
    "our_share_of_peak": "our share of that",
    "tokens_per_update": "tokens/update",
    "mean_loss": "mean loss",
    "largest_loss_gap": "loss gap",
}


def dpo(arguments: list[str]) -> None:
    """Direct preference optimisation."""
    _main("dpo", arguments)


def rm(arguments: list[str]) -> None:
    """Reward models."""
    _main("rm", arguments)


def _main(stage: str, arguments: list[str]) -> None:
    parser = options(stage, __doc__, OTHERS[stage])
    parser.add_argument("--data", type=Path, required=True, help="pairs in the sharegpt form, .json or .jsonl")
    args = parse(parser, arguments, OTHERS[stage])
    rows = 2 * args.batch * (WARM_UP + args.steps)  # some are left out
    contenders, peaks = measure(args, lambda file: _contenders(stage, args, file), rows, WARM_UP)
    publish(stage, args, machine(args.threads), table(contenders, peaks, args.batch), HEADS)
    answers = contenders[0].answers
    common, tokens = (sum(answer[key] for answer in answers) for key in ("common", "tokens"))
    print(f"tokens that the sides of a pair have in common: {common / tokens:.1%} of all, computed once by tunesmith")


def _contenders(stage: str, args: argparse.Namespace, file: Path) -> list[Contender]:
    unit: dict[str, Any] = {
        "batch": args.batch, "cutoff": args.cutoff, "rate": RATES[stage], "steps": WARM_UP + args.steps + 1,
        "settings": SETTINGS[stage], "precompute": False,
    }  # fmt: skip

    def arguments(**changes: Any) -> list[str]:
        return [args.model, str(file), json.dumps(unit | changes)]

    found = [contender("tunesmith", "ours", arguments())]
    for other in args.against.split(","):
        if other == "bare":
            found.append(contender("bare", "bare_pairs", arguments()))
        else:
            found.append(contender(other, "with_trl_pairs", arguments(precompute=other == "trl-precomputed"), trl_python()))
    return found


def table(contenders: list[Contender], peaks: dict[str, float], batch: int) -> list[dict[str, Any]]:
    """One row for each trainer, ours first.

    Args:
        contenders: after their turns.
        peaks: highest memory of each, MiB.
        batch: pairs of an update.
    """
    ours, rows = contenders[0], []
    for one in contenders:
        if one.tokens != ours.tokens:
            raise SystemExit(f"{one.name} was given other rows than {ours.name}: {one.tokens} tokens, not {ours.tokens}")
        whole, mine = _whole(one, batch), _whole(ours, batch)
        pairs = batch * len(one.seconds)
        rows.append({
            "name": one.name,
            "pairs_per_second": round(pairs / sum(whole), 3),
            "tokens_per_second": round(sum(one.tokens) / sum(whole), 1),
            "ours_is_faster_by": round(times_faster(mine, whole), 3),
            "updates_pairs_per_second": round(pairs / sum(one.seconds), 3),
            "updates_ours_is_faster_by": round(times_faster(ours.seconds, one.seconds), 3),
            "peak_mib": round(peaks[one.name]),
            "our_share_of_peak": round(peaks[ours.name] / peaks[one.name], 3),
            "tokens_per_update": round(sum(one.tokens) / len(one.tokens)),
            "mean_loss": round(sum(one.losses) / len(one.losses), 4),
            "largest_loss_gap": round(loss_gap(ours, one), 4),
            "losses": [round(loss, 4) for loss in one.losses],
        })  # fmt: skip
    return rows


def _whole(one: Contender, batch: int) -> list[float]:
    """Seconds of each update with its pairs' share of what was computed once."""
    share = batch * one.ready["once"] / one.ready["pairs"] if one.ready.get("once") else 0.0
    return [seconds + share for seconds in one.seconds]

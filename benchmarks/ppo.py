"""A whole iteration of PPO against separate models, by turns: ``python -m benchmarks ppo --against separate --data FILE``.

Work unit: SmolLM2-135M, bf16; policy, values, reference and a reward model; LoRA rank 8 on all linear layers. An iteration is a
rollout (answers to ``--prompts`` prompts, ``--samples`` each, at most ``--new`` tokens), its scoring (rewards, values,
advantages, log-probabilities of policy and reference) and ``--epochs`` passes over it in updates of ``--batch`` answers.
``separate`` (``contenders/separate_ppo.py``) has a model for each role, generates in one padded batch until the longest answer
is done, and makes all logits. The reward model is an adapter of random numbers: what it says costs the same whatever it is.

Each process samples its own answers, so times are compared for each token of an answer; with ``--given`` nothing is sampled,
and both learn from the answers that the rows have. Then the losses of the first update have to agree (``--dtype fp32``: to 1e-4
or the command fails); from then on the critic of ``separate`` has a trunk of its own, and ours does not.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from benchmarks.contenders.bare import lora
from benchmarks.machine import median
from benchmarks.report import machine, measure, options, parse, publish
from benchmarks.turns import Contender, contender

WARM_UP = 1
OTHERS = ("separate",)
SETTINGS = {
    "kl_coef": 0.05, "kl_estimator": "k1", "gamma": 1.0, "gae_lambda": 0.95, "cliprange": 0.2, "cliprange_value": 0.2,
    "vf_coef": 0.1,
}  # fmt: skip
"""What both heed; advantages are whitened, scores are not scaled, entropy is watched and no part of the loss."""
RATE = 1e-5
TOLERANCE = 1e-4
"""Of the losses of the first update, in float32."""
PARTS = ("rollout", "scoring", "updates")
HEADS = {
    "name": "trainer",
    "answers_per_second": "answers/s",
    "seconds": "s/iteration",
    "ours_is_faster_by": "ours is faster by",
    **{key: head for part in PARTS for key, head in ((part, f"s/{part}"), (f"{part}_faster_by", "ours is faster by"))},
    "peak_mib": "peak MiB",
    "our_share_of_peak": "our share of that",
    "tokens_per_answer": "tokens/answer",
    "positions_per_token": "computed positions/token",
    "policy_loss": "policy loss",
    "value_loss": "value loss",
    "first_loss_gap": "first losses apart by",
}


def main(arguments: list[str]) -> None:
    """Measure and print."""
    parser = options("ppo", __doc__, OTHERS)
    parser.add_argument("--data", type=Path, required=True, help="alpaca rows, .json or .jsonl")
    parser.add_argument("--prompts", type=int, default=16, help="of a rollout")
    parser.add_argument("--samples", type=int, default=1, help="answers to each prompt")
    parser.add_argument("--new", type=int, default=64, help="longest answer, in tokens")
    parser.add_argument("--epochs", type=int, default=4, help="passes over a rollout")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: the processor's time, on a busy machine")
    parser.add_argument("--given", action="store_true", help="learn from the rows' own answers; nothing is sampled")
    parser.set_defaults(against="separate", steps=3)
    args = parse(parser, arguments, OTHERS)
    if args.prompts * args.samples % args.batch:
        parser.error(f"--batch: {args.prompts} x {args.samples} answers of a rollout are not a multiple of {args.batch}")
    rows = 2 * args.prompts * (WARM_UP + args.steps)  # prompts longer than --cutoff are left out
    with tempfile.TemporaryDirectory() as scratch:
        reward_adapter(args.model, Path(scratch))
        contenders, peaks = measure(args, partial(_contenders, args, scratch), rows, WARM_UP)
    publish("ppo-given" if args.given else "ppo", args, machine(args.threads), table(contenders, peaks, args.given), HEADS)
    gap = max(first_loss_gap(contenders[0], one) for one in contenders) if args.given and args.dtype == "fp32" else 0.0
    if gap > TOLERANCE:
        raise SystemExit(f"the losses of the first update are {gap:.2e} apart, more than {TOLERANCE:.0e}: this is other work")


def unit_of(args: argparse.Namespace) -> dict[str, Any]:
    """The work unit, for contenders to read."""
    keys = ("prompts", "samples", "new", "epochs", "batch", "cutoff", "dtype", "clock", "given")
    fixed = {"steps": WARM_UP + args.steps + 1, "rate": RATE, "settings": SETTINGS}
    return {**{key: getattr(args, key) for key in keys}, **fixed}


def _contenders(args: argparse.Namespace, reward: str, file: Path) -> list[Contender]:
    arguments = [args.model, reward, str(file), json.dumps(unit_of(args))]
    return [contender("tunesmith", "ours_ppo", arguments), contender("separate models", "separate_ppo", arguments)]


def reward_adapter(model: str, folder: Path) -> None:
    """A reward model of random numbers: LoRA whose product is not zero, and a head that is not.

    Args:
        model: folder of the trunk.
        folder: gets the adapter and ``value_head.safetensors``.
    """
    torch.manual_seed(0)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), lora("CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    adapted.save_pretrained(folder)
    width = adapted.config.hidden_size
    head = {"v_head.summary.weight": torch.randn(1, width) / width**0.5, "v_head.summary.bias": torch.zeros(1)}
    save_file(head, folder / "value_head.safetensors")


def table(contenders: list[Contender], peaks: dict[str, float], given: bool) -> list[dict[str, Any]]:
    """One row for each trainer, ours first.

    Args:
        contenders: after their turns.
        peaks: highest memory of each, MiB.
        given: whether all learned from the same answers.
    """
    ours, rows = contenders[0], []
    for one in contenders:
        if given and one.tokens != ours.tokens:
            raise SystemExit(f"{one.name} was given other answers than {ours.name}: {one.tokens} tokens, not {ours.tokens}")
        row: dict[str, Any] = {
            "name": one.name,
            "answers_per_second": round(_total(one, "answers") / sum(one.seconds), 3),
            "seconds": round(median(one.seconds), 2),
            "ours_is_faster_by": _faster(ours, one, "seconds"),
        }
        for part in PARTS:
            idle = given and part == "rollout"
            row[part] = None if idle else round(median([answer[part] for answer in one.answers]), 2)
            row[f"{part}_faster_by"] = None if idle else _faster(ours, one, part)
        rows.append({
            **row,
            "rollout_tokens_per_second": None if given else round(sum(one.tokens) / _total(one, "rollout"), 1),
            "peak_mib": round(peaks[one.name]),
            "our_share_of_peak": round(peaks[ours.name] / peaks[one.name], 3),
            "tokens_per_answer": round(sum(one.tokens) / _total(one, "answers"), 1),
            "positions_per_token": round(_total(one, "positions") / _total(one, "real"), 3),
            **{f"{name}_loss": round(_mean_loss(one, name), 6) for name in ("policy", "value")},
            "first_loss_gap": float(f"{first_loss_gap(ours, one):.2e}") if given else None,
            "iterations": [{key: one_answer[key] for key in ("tokens", *PARTS)} for one_answer in one.answers],
        })  # fmt: skip
    return rows


def first_loss_gap(ours: Contender, other: Contender) -> float:
    """How far the losses of policy and values of the first update of all are apart, the larger of the two."""
    mine, theirs = ours.answers[0]["first"], other.answers[0]["first"]
    return max(abs(mine[name] - theirs[name]) for name in ("policy", "value"))


def _faster(ours: Contender, other: Contender, part: str) -> float:
    """Median over rounds of their seconds by ours, each for a token of an answer."""
    pairs = zip(ours.answers, other.answers, strict=True)
    return round(median([(two[part] / two["tokens"]) / (one[part] / one["tokens"]) for one, two in pairs]), 3)


def _total(one: Contender, key: str) -> float:
    return float(sum(answer[key] for answer in one.answers))


def _mean_loss(one: Contender, name: str) -> float:
    losses = [update[name] for answer in one.answers for update in answer["losses"]]
    return float(sum(losses) / len(losses))

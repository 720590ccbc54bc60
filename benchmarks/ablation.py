"""``python -m benchmarks.ablation [key=value ...]``: what each technique of the fast step is worth, by turns in one process.

One model, the same weights, rows and order; each batch is computed (forward and backward, no update) once with every set of
techniques before the next; which comes first goes round. Ratios are medians over batches of the time without a technique by
the time with all of them. ``--clock cpu`` counts the processor's time instead of the wall's, for machines that others use too.
Keys are those of ``tunesmith train``; the work unit is SmolLM2-135M, LoRA rank 8 on all linear layers, bf16, batch 4, cutoff
1024. With ``stage=dpo`` or ``stage=rm`` (and a data set of pairs) what pairs alone have comes besides; the tokens of a pair's
prompt count twice then.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from itertools import islice, pairwise
from typing import Any

import torch
from peft import PeftModel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import ROOT
from tunesmith.config.load import load_config
from tunesmith.model import attention, stacks
from tunesmith.model.adapter import trainable_parameters
from tunesmith.model.attention_kernel import PLAIN
from tunesmith.model.attention_routes import Segments
from tunesmith.model.builtin import fetch
from tunesmith.model.fuse import unfuse
from tunesmith.model.lora_kernel import remove_lora_kernel
from tunesmith.stages.pairs import answer_logps
from tunesmith.stages.run import build_trainer
from tunesmith.stages.scores import batch_logprobs
from tunesmith.train.progress import SilentReporter
from tunesmith.train.trainer import PeftTrainer
from tunesmith.types import Batch, LossOutput

WARM_UP = 2
Technique = Callable[[PeftTrainer], Callable[[], None]]
"""Switches a technique off; what it returns switches it on again."""


def without_head(trainer: PeftTrainer) -> Callable[[], None]:
    """Losses from all logits."""
    given = trainer.given
    trainer.given = dataclasses.replace(given, output=None)

    def back() -> None:
        trainer.given = given

    return back


def without_lora(trainer: PeftTrainer) -> Callable[[], None]:
    """PEFT's own forward in every LoRA layer."""
    return remove_lora_kernel(trainer.model)


def without_attention(trainer: PeftTrainer) -> Callable[[], None]:
    """The library's attention for each segment."""

    def library(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scale: float, *rest: Any, **say: Any
    ) -> torch.Tensor:
        assert rest == (PLAIN, None), "the library has no such attention"
        own = [*pairwise(segments.edges)]
        spans = zip(own, segments.before or [(0, 0)] * len(own), strict=True)
        parts = [_library(q[:, :, a:b], *(torch.cat([t[:, :, c:d], t[:, :, a:b]], 2) for t in (k, v)), scale)
                 for (a, b), (c, d) in spans]  # fmt: skip
        return torch.cat(parts, dim=2).transpose(1, 2).contiguous()

    own = attention.compute
    attention.compute = library

    def back() -> None:
        attention.compute = own

    return back


def _library(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """The last ``q.shape[2]`` of the rows' positions ask; a mask only where there are others."""
    length, keys = q.shape[2], k.shape[2]
    mask = None if length == keys else torch.ones(length, keys, dtype=torch.bool).tril(keys - length)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True)


def without_stacks(trainer: PeftTrainer) -> Callable[[], None]:
    """Short segments one by one."""
    longest = stacks._SHORT
    stacks._SHORT = 0

    def back() -> None:
        stacks._SHORT = longest

    return back


def without_fused(trainer: PeftTrainer) -> Callable[[], None]:
    """The library's own norms and gated activations."""
    return unfuse(trainer.model)


def without_sharing(trainer: PeftTrainer) -> Callable[[], None]:
    """What both rows of a pair begin with computed for each."""
    forward = trainer.given.forward
    forward.share = False

    def back() -> None:
        forward.share = True

    return back


def without_reference(trainer: PeftTrainer) -> Callable[[], None]:
    """The reference asked again in every step, by the model without its adapters."""
    given, compute = trainer.given, trainer.compute_loss

    def asked(batch: Batch) -> LossOutput:
        assert isinstance(trainer.model, PeftModel), "the reference is what is beneath the adapters"
        with torch.no_grad(), trainer.model.disable_adapter():
            sums_R, _ = answer_logps(batch, batch_logprobs(given, batch), given.finetuning.ld_alpha)
        return compute(dataclasses.replace(batch, reference_2P=torch.stack(sums_R.chunk(2))))

    trainer.compute_loss = asked  # type: ignore[method-assign]

    def back() -> None:
        del trainer.compute_loss

    return back


SHARING = "common beginnings of pairs computed once"
TECHNIQUES: dict[str, Technique] = {
    "head in chunks, its gradient in the forward pass": without_head,
    "LoRA layers as one autograd function": without_lora,
    "attention by blocks (CPU)": without_attention,
    "short rows in stacks (CPU)": without_stacks,
    "norms and gated activations fused": without_fused,
}
OF_STAGES: dict[str, dict[str, Technique]] = {
    "dpo": {SHARING: without_sharing, "log-probabilities of the reference kept": without_reference},
    "rm": {SHARING: without_sharing},
}
NOT_USED = {"rm": {"head in chunks, its gradient in the forward pass"}}
"""A reward model has no output head."""


def techniques_of(stage: str) -> dict[str, Technique]:
    """Those that a stage has."""
    common = {name: off for name, off in TECHNIQUES.items() if name not in NOT_USED.get(stage, ())}
    return common | OF_STAGES.get(stage, {})


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation")
    parser.add_argument("--steps", type=int, default=12, help="measured batches")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("keys", nargs="*", help="key=value of the configuration")
    args = parser.parse_args()
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    with tempfile.TemporaryDirectory() as scratch:
        settings = {
            "model_name_or_path": str(fetch("smollm2-135m")), "dataset": str(ROOT / "examples/data/general.jsonl"),
            "output_dir": f"{scratch}/run", "compute_dtype": "bf16", "per_device_train_batch_size": 4, "cutoff_len": 1024,
            "learning_rate": 1e-4, "max_steps": WARM_UP + args.steps, "disable_shuffling": True, "truncation": "keep_start",
        }  # fmt: skip
        config, _ = load_config(None, [*(f"{key}={json.dumps(value)}" for key, value in settings.items()), *args.keys])
        trainer, _ = build_trainer(config, SilentReporter())
    trainer.model.train()
    techniques = techniques_of(config.finetuning.stage)
    if config.finetuning.stage in OF_STAGES:
        leave_the_start(trainer)
    sets: dict[str, tuple[Technique, ...]] = {
        "all": (),
        **{f"without {name}": (off,) for name, off in techniques.items()},
        "none": tuple(techniques.values()),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sets}
    losses: dict[str, list[float]] = {name: [] for name in sets}
    tokens = 0
    for number, window in enumerate(islice(trainer.loader.windows(0), WARM_UP + args.steps)):
        for name, off in [*sets.items()][number % len(sets) :] + [*sets.items()][: number % len(sets)]:
            back = [switch(trainer) for switch in off]
            began = clock()
            loss = _compute(trainer, window[0])
            ended = clock()
            for restore in back:
                restore()
            if number >= WARM_UP:
                seconds[name].append(ended - began)
                losses[name].append(loss)
        tokens += window[0].num_tokens if number >= WARM_UP else 0
    print(f"{date.today()}  torch {torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} on "
          f"{platform.machine()}; {len(seconds['all'])} batches, {tokens} tokens; {' '.join(args.keys)}")  # fmt: skip
    for name, times in seconds.items():
        ratio = statistics.median(slow / fast for slow, fast in zip(times, seconds["all"], strict=True))
        gap = max(abs(a - b) / abs(b) for a, b in zip(losses[name], losses["all"], strict=True))
        print(f"{name:58} {tokens / sum(times):6.0f} tokens/s  all is {ratio:.2f} x as fast  losses differ by {gap:.1e}")


def leave_the_start(trainer: PeftTrainer) -> None:
    """What begins at 0 (second factors of adapters, the head) makes every loss ln 2, whatever is computed."""
    torch.manual_seed(0)
    for parameter in trainable_parameters(trainer.model).values():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.01)


def _compute(trainer: PeftTrainer, batch: Batch) -> float:
    """Forward and backward of one batch; the gradients are dropped."""
    output = trainer.compute_loss(batch)
    (output.sum / output.count).backward()
    trainer.model.zero_grad()
    return output.sum.item() / output.count


if __name__ == "__main__":
    main()

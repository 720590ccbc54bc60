"""``python -m benchmarks.attention``: attention of rows laid end to end by our kernel and by the library's, by turns.

Nine query heads on three key heads of 64, as SmolLM2-135M has them. The library computes each row alone by
``scaled_dot_product_attention``, with a mask where a window is shorter than the row, and bounded scores as transformers' eager
attention does. Times are medians of the processor's time, milliseconds of the forward and the backward pass.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import date
from itertools import accumulate, pairwise

import torch
from torch.nn.functional import scaled_dot_product_attention

from tunesmith.model import stacks
from tunesmith.model.attention_kernel import PLAIN, Variant, attend

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Sequence[int], Variant], torch.Tensor]

_HEADS, _KEYS, _WIDTH = 9, 3, 64
_SCALE = _WIDTH**-0.5


def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, edges: Sequence[int], variant: Variant) -> torch.Tensor:
    """Our kernel."""
    return attend(q, k, v, edges, _SCALE, variant)


def alone(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, edges: Sequence[int], variant: Variant) -> torch.Tensor:
    """Our kernel, short rows one by one."""
    longest, stacks._SHORT = stacks._SHORT, 0
    try:
        return attend(q, k, v, edges, _SCALE, variant)
    finally:
        stacks._SHORT = longest


def library(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, edges: Sequence[int], variant: Variant) -> torch.Tensor:
    """The library's, row by row."""
    parts = [_row(*(t[:, :, a:b] for t in (q, k, v)), variant) for a, b in pairwise(edges)]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous()


def _row(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, variant: Variant) -> torch.Tensor:
    length, mask = q.shape[2], None
    if variant.cap is not None or (variant.window is not None and variant.window < length):
        at = torch.arange(length)
        mask = (at <= at[:, None]) & (at > at[:, None] - (variant.window or length))
    if variant.cap is None:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=_SCALE, enable_gqa=True)
    assert mask is not None
    k, v = (t.repeat_interleave(_HEADS // _KEYS, dim=1) for t in (k, v))
    scores = variant.cap * torch.tanh(q @ k.mT * _SCALE / variant.cap)
    return scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def cases() -> dict[str, tuple[list[int], Variant]]:
    """Name -> lengths of the rows, variant."""
    draw = random.Random(0)
    return {
        "128 rows of 16": ([16] * 128, PLAIN),
        "64 rows of 32": ([32] * 64, PLAIN),
        "64 rows of 20 to 100": ([draw.randint(20, 100) for _ in range(64)], PLAIN),
        "4 rows of 60 to 200": ([draw.randint(60, 200) for _ in range(4)], PLAIN),
        "1 row of 1,024": ([1024], PLAIN),
        "1 row of 1,024, window 256": ([1024], Variant(256)),
        "1 row of 2,048, window 256": ([2048], Variant(256)),
        "1 row of 4,096, window 256": ([4096], Variant(256)),
        "1 row of 1,024, bounded scores": ([1024], Variant(cap=50.0)),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    args = parser.parse_args()
    torch.set_num_threads(1)
    kinds: dict[str, Attention] = {"ours": ours, "rows one by one": alone, "library": library}
    print(f"{date.today()}  torch {torch.__version__}, 1 thread of {os.cpu_count()} on {platform.machine()}; {args.dtype}")
    for name, (lengths, variant) in cases().items():
        edges = [0, *accumulate(lengths)]
        seconds: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
        for turn in range(args.turns + 2):
            for kind, function in kinds.items():
                taken = _time(function, edges, variant, getattr(torch, args.dtype))
                if turn >= 2:
                    seconds[kind].append(taken)
        ratio = statistics.median(sum(b) / sum(a) for a, b in zip(seconds["ours"], seconds["library"], strict=True))
        times = [(kind, *(1e3 * statistics.median(part) for part in zip(*all_, strict=True))) for kind, all_ in seconds.items()]
        shown = "  ".join(f"{kind} {forward:6.1f} / {backward:6.1f}" for kind, forward, backward in times)
        print(f"{name:32} {shown}  ratio {ratio:.1f}", flush=True)


def _time(function: Attention, edges: Sequence[int], variant: Variant, dtype: torch.dtype) -> tuple[float, float]:
    q, k, v = (torch.randn(1, edges[-1], heads, _WIDTH, dtype=dtype).transpose(1, 2) for heads in (_HEADS, _KEYS, _KEYS))
    given = [tensor.requires_grad_() for tensor in (q, k, v)]
    began = time.process_time()
    out = function(q, k, v, edges, variant)
    middle = time.process_time()
    torch.autograd.grad(out, given, torch.ones_like(out))
    return middle - began, time.process_time() - middle


if __name__ == "__main__":
    main()

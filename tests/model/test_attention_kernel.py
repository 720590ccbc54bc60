"""Attention by blocks against the library's, with one query head for a key head or several, whole blocks and not."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM

from tunesmith.model import attention, attention_kernel
from tunesmith.model.attention_kernel import attend
from tunesmith.model.forward import segments_work


def drawn(total: int, heads: int, keys: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Query, key, value as models make them (tokens first in memory), and a gradient of the output."""
    draw = torch.Generator().manual_seed(0)
    made = [torch.randn(1, total, count, 8, generator=draw, dtype=torch.float64) for count in (heads, keys, keys, heads)]
    return [*(t.to(dtype).transpose(1, 2).requires_grad_() for t in made[:3]), made[3].to(dtype)]


def expected(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, edges: tuple[int, ...], scale: float) -> torch.Tensor:
    parts = [
        scaled_dot_product_attention(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], is_causal=True, scale=scale, enable_gqa=True)
        for a, b in pairwise(edges)
    ]
    return torch.cat(parts, 2).transpose(1, 2)


@pytest.mark.parametrize(("heads", "keys"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("lengths", [(1, 64, 65), (200, 3), (130,)])
def test_output_and_gradients(heads: int, keys: int, lengths: tuple[int, ...]) -> None:
    edges = (0, *torch.tensor(lengths).cumsum(0).tolist())
    q, k, v, do = drawn(edges[-1], heads, keys)
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    reference = expected(*exact, edges, 0.7)
    found = attend(q, k, v, edges, 0.7)
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), reference, rtol=1e-5, atol=1e-6)
    mine = torch.autograd.grad(found, (q, k, v), do)
    for gradient, other in zip(mine, torch.autograd.grad(reference, exact, do.double()), strict=True):
        assert (gradient - other).norm() <= 1e-6 * other.norm()


@pytest.mark.parametrize("tiles", [False, True])
def test_bf16_is_as_near_to_the_truth_as_the_library(tiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_kernel, "_TILES", tiles)
    q, k, v, do = drawn(180, 6, 2, torch.bfloat16)
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    truth = expected(*exact, (0, 180), 0.35)
    truths = [t.detach() for t in (truth, *torch.autograd.grad(truth, exact, do.double()))]

    def errors(out: torch.Tensor) -> list[float]:
        found = [t.detach() for t in (out, *torch.autograd.grad(out, (q, k, v), do))]
        return [((a - b).norm() / b.norm()).item() for a, b in zip(found, truths, strict=True)]

    ours = errors(attend(q, k, v, (0, 180), 0.35))
    theirs = errors(expected(q, k, v, (0, 180), 0.35))
    assert max(ours) < 1.2 * max(theirs) < 0.02


def test_the_function_has_the_derivatives_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_kernel, "_BLOCK", 2)
    q, k, v, _ = drawn(6, 2, 1, torch.float64)
    assert torch.autograd.gradcheck(lambda *t: attend(*t, (0, 5, 6), 0.5), (q, k, v))


def test_autocast_says_the_dtype_as_for_the_library() -> None:
    """Under full tuning queries and keys come out of their rotation in float32, values as bf16."""
    q, k, v, do = drawn(70, 4, 2)
    mixed = v.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = attend(q, k, mixed, (0, 70), 0.3), expected(q, k, mixed, (0, 70), 0.3)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    found, others = (torch.autograd.grad(out, (q, k, mixed), do.bfloat16()) for out in (ours, theirs))
    for gradient, other in zip(found, others, strict=True):
        assert gradient.dtype == other.dtype and (gradient - other).norm() <= 2e-2 * other.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_saw_each_other_would_be_noticed(
    tiny_model: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention.register()
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype)
    monkeypatch.setattr(attention, "attend", lambda q, k, v, edges, scale: attend(q, k, v, (0, edges[-1]), scale))
    works, reason = segments_work(model, 64)
    assert not works and "other logits" in reason
    monkeypatch.undo()
    assert segments_work(model, 64) == (True, "")

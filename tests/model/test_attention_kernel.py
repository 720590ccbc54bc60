"""Attention by blocks against the library's or worked out: grouped heads, whole blocks and not, stacks, variants."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tunesmith.model import attention_kernel, stacks
from tunesmith.model.attention_kernel import Variant, attend


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


def worked_out(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, edges: tuple[int, ...], variant: Variant, sinks_h: torch.Tensor | None
) -> torch.Tensor:
    """Attention as its definition says it, the scores times 0.6."""
    parts = []
    for a, b in pairwise(edges):
        keys, values = (t[0, :, a:b].repeat_interleave(q.shape[1] // t.shape[1], 0) for t in (k, v))
        scores, at = q[0, :, a:b] @ keys.mT * 0.6, torch.arange(b - a)
        if variant.cap is not None:
            scores = variant.cap * torch.tanh(scores / variant.cap)
        hidden = at > at[:, None]
        if variant.window is not None:
            hidden = hidden | (at <= at[:, None] - variant.window)
        scores = scores.masked_fill(hidden, -torch.inf)
        if sinks_h is not None:
            scores = torch.cat([scores, sinks_h[:, None, None].expand(-1, b - a, 1)], -1)
        parts.append(scores.softmax(-1)[..., : b - a] @ values)
    return torch.cat(parts, 1).transpose(0, 1)[None]


@pytest.mark.parametrize("short", [0, 96])
@pytest.mark.parametrize("cap", [None, 0.7])
@pytest.mark.parametrize("sinks", [False, True])
def test_variants(short: int, cap: float | None, sinks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows shorter and longer than blocks of 4 and than rows; rows alone and stacked, which are filled up."""
    monkeypatch.setattr(attention_kernel, "_BLOCK", 4)
    monkeypatch.setattr(stacks, "_SHORT", short)
    edges = (0, 11, 12, 23, 30, 41, 50)
    q, k, _, _ = drawn(50, 4, 2, torch.float64)
    v, do = (torch.randn(1, 50, n, 5, dtype=torch.float64).transpose(1, 2) for n in (2, 4))
    sinks_h = torch.randn(4, dtype=torch.float64).requires_grad_() if sinks else None
    given = [q, k, v.requires_grad_(), *([sinks_h] if sinks_h is not None else [])]
    for window in (None, 1, 2, 3, 4, 5, 7, 9, 100):
        found = attend(q, k, v, edges, 0.6, Variant(window, cap), sinks_h)
        reference = worked_out(q, k, v, edges, Variant(window, cap), sinks_h)
        torch.testing.assert_close(found, reference)
        theirs = torch.autograd.grad(reference, given, do.transpose(1, 2))
        for mine, other in zip(torch.autograd.grad(found, given, do.transpose(1, 2)), theirs, strict=True):
            torch.testing.assert_close(mine, other)


def test_blocks_outside_the_window_are_not_computed() -> None:
    """Work of a row of n tokens is n times the window and a block, not n squared."""

    def scores(window: int | None) -> int:
        return sum(block.rows * (block.keys.stop - block.keys.start) for block in attention_kernel._blocks(4096, window))

    assert scores(256) <= 4096 * (256 + 64)
    assert scores(None) > 4096 * 2048


@pytest.mark.parametrize("lengths", [(5, 40, 40, 7, 300, 33), (1,) * 9, (96, 97)])
def test_every_segment_is_in_one_stack_with_others_of_its_size(lengths: tuple[int, ...]) -> None:
    edges = (0, *torch.tensor(lengths).cumsum(0).tolist())
    made = stacks.stacks(edges, 6, 2)
    assert sorted(segment for stack in made for segment in stack.segments) == list(pairwise(edges))
    tensor = torch.randn(1, edges[-1], 6, 3).transpose(1, 2)
    copy = torch.zeros_like(tensor)
    for stack in made:
        sizes = [end - begin for begin, end in stack.segments]
        assert max(sizes) == stack.length and (len(sizes) == 1 or max(sizes) - min(sizes) < 16)
        taken = stack.take(tensor, blank=True)
        whole = sum(tensor[:, :, a:b].square().sum().item() for a, b in stack.segments)
        assert taken.square().sum().item() == pytest.approx(whole, rel=1e-5)  # what it is filled up with is nothing
        stack.put(taken, copy)
    assert torch.equal(copy, tensor)


def test_dropout_takes_the_share_and_its_gradient_is_that_of_what_was_kept() -> None:
    q, k, _, _ = drawn(80, 4, 2, torch.float64)
    ones = torch.ones(1, 80, 2, 8, dtype=torch.float64).transpose(1, 2).requires_grad_()
    variant, edges = Variant(7, dropout=0.3), (0, 70, 75, 80)
    torch.manual_seed(3)
    state = torch.get_rng_state()

    def again() -> torch.Tensor:
        torch.set_rng_state(state)
        return attend(q, k, ones, edges, 0.6, variant)

    out = again()
    assert not torch.equal(out, attend(q, k, ones, edges, 0.6, variant))  # drawn anew each time
    assert out.mean().item() == pytest.approx(1.0, abs=0.05)  # weights of each query sum to one in the mean
    assert out[0, 0, :, 0].tolist() == pytest.approx([round(x) * (1 / 0.7) for x in (out[0, 0, :, 0] * 0.7).tolist()])
    assert torch.equal(out, again())
    do = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (q, k, ones), do)
    for tensor, gradient in zip((q, k, ones), gradients, strict=True):
        step = torch.randn_like(tensor) * 1e-5
        with torch.no_grad():
            tensor += step
            up = (again() * do).sum()
            tensor -= 2 * step
            down = (again() * do).sum()
            tensor += step
        assert ((up - down) / 2).item() == pytest.approx((gradient * step).sum().item(), rel=1e-5)


def test_the_function_has_the_derivatives_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_kernel, "_BLOCK", 2)
    q, k, v, _ = drawn(6, 2, 1, torch.float64)
    sinks_h = torch.randn(2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda q, k, v, sinks_h: attend(q, k, v, (0, 5, 6), 0.5, Variant(3, 0.8), sinks_h), (q, k, v, sinks_h)
    )


def test_autocast_says_the_dtype_as_for_the_library() -> None:
    """Under full tuning queries and keys come out of their rotation in float32, values as bf16."""
    q, k, v, do = drawn(70, 4, 2)
    mixed = v.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = attend(q, k, mixed, (0, 70), 0.3), expected(q, k, mixed, (0, 70), 0.3)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    found, others = (torch.autograd.grad(out, (q, k, mixed), do.bfloat16()) for out in (ours, theirs))
    with torch.autocast("cpu", torch.bfloat16):
        again = attend(q.bfloat16(), k.bfloat16(), mixed, (0, 70), 0.3)
    assert torch.equal(ours, again) and torch.equal(ours, attend(q.bfloat16(), k.bfloat16(), mixed, (0, 70), 0.3))
    for gradient, other in zip(found, others, strict=True):
        assert gradient.dtype == other.dtype and (gradient - other).norm() <= 2e-2 * other.norm()

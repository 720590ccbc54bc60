"""Rows that begin alike, computed once: as padded, as one by one, forwards and backwards, whatever the rows."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from tests.model.test_attention import MODELS, built
from tests.model.test_attention_kernel import drawn, worked_out
from tunesmith.data.collator import collate
from tunesmith.data.kinds import common_tokens, pair_of
from tunesmith.data.learned import Learned
from tunesmith.model import attention_kernel, attention_routes, stacks
from tunesmith.model.attention_kernel import Variant, attend
from tunesmith.model.forward import FlatForward, segments_work, sharing_works
from tunesmith.model.heads import row_ends
from tunesmith.model.shared import layout
from tunesmith.types import Batch, PairExample, Source

EDGES = (0, 23, 30, 41, 42, 50)
BEFORE = ((0, 0), (0, 9), (0, 9), (0, 22), (0, 0))


@pytest.mark.parametrize("short", [0, 96])
@pytest.mark.parametrize("cap", [None, 0.7])
@pytest.mark.parametrize("sinks", [False, True])
def test_kernel(short: int, cap: float | None, sinks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments that go on from others equal whole rows, gradients of what they share included."""
    monkeypatch.setattr(attention_kernel, "_BLOCK", 4)
    monkeypatch.setattr(stacks, "_SHORT", short)
    q, k, v, do = drawn(50, 4, 2, torch.float64)
    sinks_h = torch.randn(4, dtype=torch.float64).requires_grad_() if sinks else None
    given = [q, k, v, *([sinks_h] if sinks_h is not None else [])]
    for window in (None, 1, 3, 7, 12, 100):
        variant = Variant(window, cap)
        found = attend(q, k, v, EDGES, 0.6, variant, sinks_h, BEFORE)
        parts = []
        for (begin, end), (first, last) in zip(pairwise(EDGES), BEFORE, strict=True):
            whole = [torch.cat([t[:, :, first:last], t[:, :, begin:end]], 2) for t in (q, k, v)]
            parts.append(worked_out(*whole, (0, whole[0].shape[2]), variant, sinks_h)[:, last - first :])
        reference = torch.cat(parts, 1)
        torch.testing.assert_close(found, reference)
        theirs = torch.autograd.grad(reference, given, do)
        for mine, other in zip(torch.autograd.grad(found, given, do), theirs, strict=True):
            torch.testing.assert_close(mine, other)


def row(ids: list[int], prompt: int, good: bool) -> Learned:
    return Learned(np.array(ids, np.int32), ((prompt, len(ids), 1.0),), Source("rows", "rows.jsonl", 1, 1), good=good)


def pair(prompt: list[int], better: list[int], worse: list[int]) -> PairExample:
    return pair_of(row([*prompt, *better], len(prompt), True), row([*prompt, *worse], len(prompt), False))


PAIRS = {
    "usual": pair([5, 6, 7, 8, 9], [10, 11, 12], [13, 14]),
    "equal answers": pair([5, 6, 7], [10, 11], [10, 11]),
    "better begins the worse": pair([5, 6, 7], [10, 11], [10, 11, 12, 13]),
    "worse begins the better": pair([5, 6, 7], [10, 11, 12, 13], [10]),
    "empty prompt": pair([], [10, 11, 12], [13, 14, 15]),
    "empty prompt, answers begin alike": pair([], [10, 11, 12], [10, 14, 15]),
    "one token": pair([5], [10], [11]),
    "long prompt": pair([*range(3, 63)], [10, 11], [12, 13, 14]),
}


def test_where_rows_begin_to_differ() -> None:
    assert [one.common for one in PAIRS.values()] == [5, 4, 4, 3, 0, 1, 1, 60]
    assert common_tokens(np.array([5]), np.array([5])) == 0


def test_layout_by_hand() -> None:
    batch = collate([pair([1, 2], [3], [4]), pair([5], [6, 7], [6, 8])])
    found = layout(batch)
    assert found is not None
    assert found.tokens_T.tolist() == [0, 1, 2, 3, 4, 5, 8, 11]
    assert found.places_V.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 6, 3, 4, 7]
    assert (found.lengths, found.before_B2.tolist()) == ((3, 3, 1, 1), [[0, 0], [0, 0], [0, 2], [3, 5]])
    assert batch.num_repeated == 4
    assert layout(replace(batch, begins_like=())) is None


def seen(forward: FlatForward, batch: Batch) -> list[torch.Tensor]:
    """Log-probabilities of the targets, logits at the ends of rows, and gradients of a sum of both."""
    wanted = replace(batch, positions_S=torch.cat([batch.positions_S, row_ends(batch)]))
    logits_SV, ends_BV = forward.logits(wanted).split([len(batch.targets_S), len(batch.lengths)])
    found = logits_SV.log_softmax(-1).gather(1, batch.targets_S[:, None])[:, 0]
    total = (found * torch.linspace(-1, 1, len(found))).sum() + ends_BV.sin().sum()
    names, parameters = zip(*forward.model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    assert sum(g is not None for g in gradients) > len(names) // 2
    return [found.detach(), ends_BV.detach(), *(g for g in gradients if g is not None)]


def close(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    """Gradients that are nothing but rounding, such as a router's that cancel, are compared with the largest ones."""
    largest = max(b.norm().item() for b in other)
    for a, b in zip(one, other, strict=True):
        assert (a - b).norm() <= 1e-5 * max(b.norm().item(), 1e-2 * largest)


@pytest.mark.parametrize("kind", MODELS)
def test_shared_is_padded_is_one_by_one(kind: str) -> None:
    """In models of many kinds; windows and chunks of 7 tokens begin before, inside and behind what is shared."""
    model = built(kind).eval()
    with torch.no_grad():
        for parameter in model.parameters() if kind == "sinks" else ():  # whose gradients would be a thousand times its outputs
            parameter.mul_(0.6)
    batch = collate(list(PAIRS.values()))
    padded = seen(FlatForward(model, False, share=True), batch)
    assert segments_work(model) == (True, "")
    assert sharing_works(model)
    together = seen(FlatForward(model, True, share=True), batch)
    close(together, padded)
    close(together, seen(FlatForward(model, True), batch))
    for index, one in enumerate(PAIRS.values()):
        alone = seen(FlatForward(model, True, share=True), collate([one]))[1]
        assert (alone - together[1][[index, index + len(PAIRS)]]).norm() <= 1e-5 * alone.norm()


def test_hidden_states() -> None:
    """Fewer tokens are computed, and the same states come out."""
    model = built("fused projections").eval()
    assert segments_work(model)[0]
    batch, computed = collate(list(PAIRS.values())), []
    model.get_decoder().embed_tokens.register_forward_pre_hook(lambda _, ids: computed.append(ids[0].numel()))
    alone, together = (FlatForward(model, True, share=share).hidden(batch, row_ends(batch)) for share in (False, True))
    assert (together - alone).norm() <= 1e-5 * alone.norm()
    assert computed == [batch.num_tokens, batch.num_tokens - batch.num_repeated]


def test_a_model_that_looks_at_neighbours_does_not_share(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built("a scale of its own").eval()
    assert segments_work(model)[0]
    layer = model.model.layers[0]
    original = layer.mlp.forward
    monkeypatch.setattr(layer.mlp, "forward", lambda x: original(x + x.roll(1, dims=1)))
    assert not sharing_works(model)


def test_keys_of_the_kernels_of_gpus() -> None:
    """What they are given, by the kernel that is tested: queries with their own ends, keys repeated before each segment."""
    q, k, v, _ = drawn(50, 4, 2, torch.float64)
    segments = attention_routes.Segments(torch.tensor(EDGES), EDGES, BEFORE)
    keys, values = attention_routes._keys(segments, k, v)
    own, ends = attention_routes._bounds(q, segments)
    expected = attend(q, k, v, EDGES, 0.6, before=BEFORE)
    for (begin, end), (first, last), (a, b) in zip(
        pairwise(EDGES), pairwise(ends.tolist()), pairwise(own.tolist()), strict=True
    ):
        scores = q[0, :, begin:end] @ keys[0, :, first:last].repeat_interleave(2, 0).mT * 0.6
        later = torch.ones(end - begin, last - first, dtype=torch.bool).triu(last - first - (end - begin) + 1)
        found = scores.masked_fill(later, -torch.inf).softmax(-1) @ values[0, :, first:last].repeat_interleave(2, 0)
        torch.testing.assert_close(found.transpose(0, 1), expected[0, a:b])

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tunesmith.model.forward import FlatForward, segments_work
from tunesmith.types import Batch

LENGTHS, ALPHA = (4, 16, 9), 3.0


def batch() -> Batch:
    total = sum(LENGTHS)
    ids = torch.arange(total) % 50
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    return Batch(ids, positions, torch.arange(total), ids, LENGTHS, ())


@pytest.mark.parametrize("segments", [True, False])
def test_noise_is_as_wide_as_the_row_is_long(tiny_model: Path, segments: bool) -> None:
    """Uniform up to alpha / sqrt(L d) with each row's own L, rows end to end or padded; none outside training."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="sdpa")
    if segments:
        assert segments_work(model)[0]
    clean_weight = model.get_input_embeddings().weight.detach()
    forward = FlatForward(model, segments, ALPHA)
    seen: list[torch.Tensor] = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: seen.append(output.detach() - clean_weight[inputs[0]])
    )
    torch.manual_seed(0)
    model.train()
    noisy = forward.logits(batch())
    rows = seen[0][0].split(LENGTHS) if segments else [row[:length] for row, length in zip(seen[0], LENGTHS, strict=True)]
    for row, length in zip(rows, LENGTHS, strict=True):
        bound = ALPHA / (length * 64) ** 0.5
        assert row.abs().max() <= bound * (1 + 1e-4)
        assert row.abs().max() > 0.97 * bound
        assert row.std() == pytest.approx(bound / 3**0.5, rel=0.1)
        assert abs(row.mean()) < 0.1 * bound
    torch.manual_seed(0)
    assert torch.equal(forward.logits(batch()), noisy)
    model.eval()
    forward.logits(batch())
    assert not seen[-1].any()

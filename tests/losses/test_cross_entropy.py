from __future__ import annotations

import math

import pytest
import torch

from tunesmith.losses.cross_entropy import token_nll


def test_nll_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    assert token_nll(logits, torch.tensor([1, 0])).tolist() == pytest.approx([math.log(2), math.log(4 / 3)], rel=1e-6)


def test_nll_of_bf16_logits_is_computed_in_float32() -> None:
    logits = torch.randn(4, 50).bfloat16()
    found = token_nll(logits, torch.arange(4))
    expected = torch.logsumexp(logits.double(), -1) - logits.double()[torch.arange(4), torch.arange(4)]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)

from __future__ import annotations

import math

import pytest
import torch

from tunesmith.losses.cross_entropy import next_token_targets, token_nll


def test_targets_by_hand() -> None:
    positions, targets = next_token_targets(torch.tensor([-100, 7, 8, -100, 9]), (3, 2))
    assert positions.tolist() == [0, 1, 3]
    assert targets.tolist() == [7, 8, 9]


def test_a_supervised_first_token_is_predicted_by_nothing() -> None:
    positions, targets = next_token_targets(torch.tensor([5, 6, 7, 8]), (2, 2))
    assert positions.tolist() == [0, 2]
    assert targets.tolist() == [6, 8]


def test_no_supervised_token() -> None:
    positions, targets = next_token_targets(torch.full((4,), -100), (4,))
    assert positions.numel() == targets.numel() == 0
    assert token_nll(torch.zeros(0, 3), targets).sum() == 0


def test_lengths_must_fit() -> None:
    with pytest.raises(AssertionError):
        next_token_targets(torch.zeros(5, dtype=torch.long), (2, 2))


def test_nll_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    assert token_nll(logits, torch.tensor([1, 0])).tolist() == pytest.approx([math.log(2), math.log(4 / 3)], rel=1e-6)


def test_nll_of_bf16_logits_is_computed_in_float32() -> None:
    logits = torch.randn(4, 50).bfloat16()
    found = token_nll(logits, torch.arange(4))
    expected = torch.logsumexp(logits.double(), -1) - logits.double()[torch.arange(4), torch.arange(4)]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)

"""Rewards, advantages and moments: numbers worked by hand, and loops written from the papers."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import torch

from tunesmith.losses.advantage import RunningMoments, clip_scores, gae, group_advantages, token_rewards, whiten

ROWS = torch.tensor([0, 0, 0, 1, 3, 3, 3, 3, 3])  # an answer of one token; answer 2 has none


def close(found: torch.Tensor, expected: list[float], within: float = 5e-5) -> None:
    assert found.tolist() == pytest.approx(expected, abs=within)


def test_the_numbers_of_the_docstrings() -> None:
    rewards = token_rewards(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 1.0, 2.0]), torch.tensor([0, 0, 1]), 0.1)
    close(rewards, [-0.05, 0.9, 1.8])
    advantages, returns = gae(torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.6]), torch.tensor([0, 0]), 1.0, 0.5)
    close(advantages, [0.3, 0.4])
    close(returns, [0.8, 1.0])
    scores, group = torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.zeros(4, dtype=torch.long)
    close(group_advantages(scores, group), [0.8659, -0.8659, -0.8659, 0.8659])
    close(group_advantages(scores, group, "none"), [0.5, -0.5, -0.5, 0.5])
    close(group_advantages(scores, group, "none", "leave_one_out"), [2 / 3, -2 / 3, -2 / 3, 2 / 3])
    close(whiten(torch.tensor([1.0, 2.0, 3.0])), [-1, 0, 1])
    close(whiten(torch.tensor([1.0, 2.0, 3.0]), shift_mean=False), [1, 2, 3])
    close(clip_scores(torch.tensor([-7.0, 2.0]), 5.0), [-5, 2])
    moments = RunningMoments().updated(torch.tensor([1.0, 3.0])).updated(torch.tensor([5.0]))
    assert (moments.count, moments.mean, moments.squares, moments.deviation) == (3, 3.0, 8.0, 2.0)
    close(moments.normalised(torch.tensor([5.0])), [1.0], 1e-4)
    close(moments.normalised(torch.tensor([5.0]), shift_mean=False), [2.5], 2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 1.0), (1.0, 1.0), (0.99, 0.0), (0.0, 0.9)])
def test_estimates_are_those_of_the_recursion(gamma: float, lam: float, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(len(ROWS), generator=draw).to(dtype) for _ in range(2))
    advantages, returns = gae(rewards, values.requires_grad_(True), ROWS, gamma, lam)
    expected, after, later = np.zeros(len(ROWS)), 0.0, 0.0
    for t in reversed(range(len(ROWS))):
        if t + 1 == len(ROWS) or ROWS[t + 1] != ROWS[t]:
            after = later = 0.0
        later = rewards[t].item() + gamma * after - values[t].item() + gamma * lam * later
        after = values[t].item()
        expected[t] = later
    assert advantages.dtype == dtype and not advantages.requires_grad and not returns.requires_grad
    np.testing.assert_allclose(advantages.numpy(), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(returns.numpy(), expected + values.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_one_answer_of_100000_tokens_takes_no_loop_over_them() -> None:
    """Returns of ``gamma = lam = 1`` are what is still to come; a loop over tokens would take seconds."""
    rewards = torch.ones(100_000)
    start = time.perf_counter()
    _, returns = gae(rewards, torch.zeros_like(rewards), torch.zeros(100_000, dtype=torch.long), 1.0, 1.0)
    assert time.perf_counter() - start < 1
    assert torch.equal(returns, torch.arange(100_000, 0, -1, dtype=torch.float32))


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_groups_in_any_order_and_of_any_size(scale: str, baseline: str) -> None:
    groups = np.array([7, 3, 7, 3, 7, 9, 3, 3])  # 9 stands alone
    scores = np.random.default_rng(0).normal(size=len(groups))
    expected = np.zeros(len(groups))
    for i, group in enumerate(groups):
        members = scores[groups == group]
        if len(members) > 1:
            others = np.delete(scores, i)[np.delete(groups, i) == group]
            away = scores[i] - (others.mean() if baseline == "leave_one_out" else members.mean())
            deviation = {"group": members.std(ddof=1), "batch": scores.std(ddof=1), "none": 1 - 1e-4}[scale]
            expected[i] = away / (deviation + 1e-4)
    found = group_advantages(torch.tensor(scores).float(), torch.tensor(groups), scale, baseline)  # type: ignore[arg-type]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_equal_scores_have_no_advantage() -> None:
    assert not group_advantages(torch.full((4,), 0.3), torch.tensor([0, 0, 0, 0])).any()


def test_moments_of_parts_are_those_of_the_whole_and_go_through_json() -> None:
    scores = torch.randn(100, generator=torch.Generator().manual_seed(0)) * 3 + 1000
    moments = RunningMoments()
    for part in scores.split([1, 40, 0, 59]):
        moments = RunningMoments.from_state(json.loads(json.dumps(moments.updated(part).state())))
    assert moments.mean == pytest.approx(scores.double().mean().item(), rel=1e-12)
    assert moments.deviation == pytest.approx(scores.double().std().item(), rel=1e-9)
    assert RunningMoments().updated(scores[:1]).deviation == 1


def test_no_answer_and_one_token() -> None:
    none, rows = torch.empty(0), torch.empty(0, dtype=torch.long)
    assert token_rewards(none, none, rows, 0.1).shape == gae(none, none, rows, 1.0, 0.9)[0].shape == (0,)
    assert whiten(none).shape == group_advantages(none, rows).shape == (0,)
    assert whiten(torch.tensor([3.0])).tolist() == [0] and whiten(torch.tensor([3.0]), shift_mean=False).tolist() == [3]
    advantages, returns = gae(torch.tensor([2.0]), torch.tensor([0.5]), torch.tensor([0]), 1.0, 0.9)
    assert advantages.tolist() == [1.5] and returns.tolist() == [2]

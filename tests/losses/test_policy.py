"""Losses of policy optimisation: numbers worked by hand, gradients, and what must not change them."""

from __future__ import annotations

import json
import math

import pytest
import torch

from tunesmith.losses.policy import (
    AdaptiveKL,
    FixedKL,
    KLController,
    approx_kl,
    clipped_policy_loss,
    clipped_tokens,
    clipped_value_loss,
    explained_variance,
    kl_estimate,
    token_weights,
)


def one(value: float) -> torch.Tensor:
    return torch.tensor([value])


ROW = torch.tensor([0])


def policy(
    ratio: float, advantage: float, low: float = 0.2, high: float = 0.2, dual: float | None = None
) -> tuple[float, float]:
    """Loss of one token and its gradient in the log-probability."""
    logp = one(math.log(ratio)).requires_grad_(True)
    loss = clipped_policy_loss(logp, one(0.0), one(advantage), ROW, low, high, "token", dual)
    loss.sum().backward()
    assert logp.grad is not None
    return loss.item(), logp.grad.item()


def test_divergence_by_hand() -> None:
    logp, reference = one(-1.0), one(-2.0)
    for kind, value in (("k1", 1.0), ("k2", 0.5), ("k3", math.exp(-1))):
        assert kl_estimate(logp, reference, kind).item() == pytest.approx(value, rel=1e-6)  # type: ignore[arg-type]
        assert kl_estimate(logp, logp, kind).item() == 0  # type: ignore[arg-type]
    assert approx_kl(one(-2.0), one(-1.0)).item() == pytest.approx(math.exp(-1), rel=1e-6)
    assert kl_estimate(one(-1.0), one(-1.0 - 1e-4), "k3").item() == pytest.approx(5e-9, rel=0.1)  # exp(d) - 1 would round to 0


def test_estimators_are_the_divergence_in_the_mean_over_what_the_model_samples() -> None:
    """Exactly, by going through the vocabulary: k1 and k3 are without bias, and k2's gradient is the divergence's."""
    draw = torch.Generator().manual_seed(0)
    logits, other = (torch.randn(6, generator=draw, dtype=torch.float64) for _ in range(2))
    logits.requires_grad_(True)
    logp, reference = logits.log_softmax(0), other.log_softmax(0)
    weights = logp.exp().detach()
    divergence = (logp.exp() * (logp - reference)).sum()
    for kind in ("k1", "k3"):
        assert (weights * kl_estimate(logp, reference, kind)).sum().item() == pytest.approx(divergence.item())  # type: ignore[arg-type]
    (expected,) = torch.autograd.grad(divergence, logits, retain_graph=True)
    (found,) = torch.autograd.grad((weights * kl_estimate(logp, reference, "k2")).sum(), logits)
    torch.testing.assert_close(found, expected)


def test_clips_by_hand() -> None:
    """Value, and gradient: ``-r A`` where the ratio counts, 0 where it is clipped."""
    assert policy(1.5, 2.0) == pytest.approx((-2.4, 0))
    assert policy(1.5, -2.0) == pytest.approx((3, 3))
    assert policy(0.5, 2.0) == pytest.approx((-1, -1))
    assert policy(0.5, -2.0) == pytest.approx((1.6, 0))
    assert policy(1.25, 2.0, high=0.28) == pytest.approx((-2.5, -2.5))
    assert policy(1.0, 2.0) == pytest.approx((-2, -2))
    assert policy(4.0, -2.0, dual=3.0) == pytest.approx((6, 0))
    assert policy(2.0, -2.0, dual=3.0) == pytest.approx((4, 4))
    assert policy(4.0, 2.0, dual=3.0) == pytest.approx((-2.4, 0))


def test_clipped_tokens_are_those_without_gradient() -> None:
    draw = torch.Generator().manual_seed(0)
    logp = torch.randn(200, generator=draw) * 0.4
    advantages, rows = torch.randn(200, generator=draw), torch.arange(200) // 7
    old = torch.zeros(200)
    logp.requires_grad_(True)
    clipped_policy_loss(logp, old, advantages, rows, 0.2, 0.3).sum().backward()
    assert logp.grad is not None
    found = clipped_tokens(logp, old, advantages, rows, 0.2, 0.3)
    assert torch.equal(found, logp.grad == 0) and 0 < found.float().mean() < 1


def test_an_answers_ratio() -> None:
    """Gradient of a whole answer's loss: ``-s A / n`` at each of its ``n`` tokens (arXiv 2507.18071, eq. 10)."""
    logp = torch.tensor([0.0, math.log(1.44), math.log(1.1)]).requires_grad_(True)
    rows, advantages = torch.tensor([0, 0, 2]), torch.tensor([2.0, 2.0, -1.0])
    loss = clipped_policy_loss(logp, torch.zeros(3), advantages, rows, 0.3, 0.3, "sequence")
    assert loss.tolist() == pytest.approx([-2.4, -2.4, 1.1])
    weights, total = token_weights(rows, 3, "sequence_mean")
    ((weights * loss).sum() / total).backward()
    assert logp.grad is not None and logp.grad.tolist() == pytest.approx([-0.4, -0.4, 1.1 / 3])
    assert clipped_tokens(logp, torch.zeros(3), advantages, rows, 0.15, 0.15, "sequence").tolist() == [True, True, False]


def test_weights_by_hand_and_micro_batches_add_up() -> None:
    rows = torch.tensor([0, 0, 1])
    for kind, expected, total in (
        ("token_mean", [1, 1, 1], 3),
        ("sequence_mean", [0.5, 0.5, 1], 2),
        ("constant", [0.25] * 3, 2),
    ):
        weights, found = token_weights(rows, 2, kind, 4.0 if kind == "constant" else None)  # type: ignore[arg-type]
        assert weights.tolist() == expected and found == total
        parts = [token_weights(torch.zeros(n, dtype=torch.long), 1, kind, 4.0) for n in (2, 1)]  # type: ignore[arg-type]
        assert torch.equal(torch.cat([part for part, _ in parts]), weights) and sum(total for _, total in parts) == found
    assert token_weights(rows, 5, "sequence_mean")[1] == 5  # answers without tokens count


def test_values_by_hand() -> None:
    value = one(1.0).requires_grad_(True)
    assert clipped_value_loss(value, one(0.0), one(2.0), 0.2).item() == pytest.approx(1.62)
    loss = clipped_value_loss(value, one(0.0), one(2.0), None)
    loss.sum().backward()
    assert loss.item() == 0.5 and value.grad is not None and value.grad.item() == -1
    assert clipped_value_loss(one(1.0), one(0.9), one(2.0), 0.2).item() == 0.5  # near the old one: no clip
    assert explained_variance(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 2.0])) == pytest.approx(0.75)
    assert explained_variance(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 2.0])) == 0
    assert explained_variance(one(1.0), one(1.0)) == 0


def test_controllers() -> None:
    adaptive = AdaptiveKL(0.2, 6.0, 100.0)
    assert adaptive.updated(12.0, 10).coef == pytest.approx(0.204)
    assert adaptive.updated(0.0, 10).coef == pytest.approx(0.196)
    assert adaptive.updated(6.6, 10).coef == pytest.approx(0.202)  # an error of 0.1 is not clipped
    controllers: list[tuple[KLController, KLController]] = [
        (adaptive.updated(12.0, 10), AdaptiveKL(0.5, 6.0, 100.0)), (FixedKL(0.3).updated(12.0, 10), FixedKL(0.5)),
    ]  # fmt: skip
    for moved, fresh in controllers:
        assert fresh.restored(json.loads(json.dumps(moved.state()))) == moved
    assert FixedKL(0.3).updated(99.0, 10).coef == 0.3

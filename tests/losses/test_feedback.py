"""The loss of feedback: numbers worked by hand, and a version of its own in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tunesmith.losses.feedback import kto_loss, reference_point


def test_the_numbers_of_the_docstrings() -> None:
    found = kto_loss(torch.tensor([1.0, 1.0]), torch.tensor([True, False]), torch.tensor(0.5), 0.5)
    assert found.tolist() == pytest.approx([0.4378, 0.5622], abs=5e-5)
    assert reference_point(torch.tensor([2.0, -1.0])).item() == 0.5
    assert reference_point(torch.tensor([1.0, -3.0])).item() == 0


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_as_in_the_paper(beta: float) -> None:
    generator = torch.Generator().manual_seed(0)
    ratios = torch.randn(8, generator=generator, dtype=torch.float32) * 3
    good = torch.tensor([True, False] * 4)
    point = reference_point(torch.randn(8, generator=generator) + 1)
    found = kto_loss(ratios, good, point, beta).numpy()
    z, r = point.item(), ratios.numpy()
    value = np.where(good.numpy(), 1 / (1 + np.exp(-beta * (r - z))), 1 / (1 + np.exp(-beta * (z - r))))
    np.testing.assert_allclose(found, 1 - value, rtol=1e-5, atol=1e-6)


def test_no_gradient_flows_through_the_reference_point() -> None:
    ratios, mismatched = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    kto_loss(ratios, torch.tensor([True, True, False, False]), reference_point(mismatched + 9), 0.3).sum().backward()
    assert mismatched.grad is None
    assert ratios.grad is not None and (ratios.grad[:2] < 0).all() and (ratios.grad[2:] > 0).all()

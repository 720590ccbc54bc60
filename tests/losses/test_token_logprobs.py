"""The kernel against plain ``log_softmax``, whatever the head does and whatever is trained of it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional

from tunesmith.losses import token_logprobs as kernel
from tunesmith.losses.token_logprobs import (
    score_tokens,
    token_logprobs,
    token_logprobs_and_entropy,
    token_logprobs_and_entropy_through,
    token_logprobs_through,
)

SHAPES = [(1.0, None), (0.3, None), (1.0, 2.0), (2.5, 4.0)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Seven rows in a chunk, three in a block, so that both loops run and end unevenly."""
    monkeypatch.setattr(kernel, "_CHUNK_BYTES", {"cpu": 7 * 50 * 4})
    monkeypatch.setattr(kernel, "_BLOCK_BYTES", 3 * 50 * 4)
    monkeypatch.setattr(kernel, "_VOCABULARY_BLOCK", 16)
    return


def made(dtype: torch.dtype = torch.float32, count: int = 17) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(count, 8, generator=draw)
    weight, bias = torch.randn(50, 8, generator=draw), torch.randn(50, generator=draw)
    targets, factors = torch.randint(0, 50, (count,), generator=draw), torch.randn(count, generator=draw)
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), targets, factors


def plain(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    scale: float,
    cap: float | None,
) -> torch.Tensor:
    logits = functional.linear(hidden, weight, bias) * scale
    logits = logits if cap is None else torch.tanh(logits / cap) * cap
    return torch.log_softmax(logits, -1)[torch.arange(len(targets)), targets]


def test_by_hand() -> None:
    hidden = torch.tensor([[1.0]], requires_grad=True)
    logp = token_logprobs(hidden, torch.tensor([[0.0], [math.log(3)]]), torch.tensor([0]))
    logp.sum().backward()
    assert logp.item() == pytest.approx(-math.log(4), rel=1e-6)
    assert hidden.grad is not None and hidden.grad.item() == pytest.approx(-0.75 * math.log(3), rel=1e-6)


@pytest.mark.parametrize(("scale", "cap"), SHAPES)
@pytest.mark.parametrize("trained", ["nothing", "weight", "bias", "both"])
def test_value_and_gradients_equal_those_of_all_logits(scale: float, cap: float | None, trained: str) -> None:
    hidden, weight, bias, targets, factors = made()
    found = [hidden, weight, bias]
    expected = [t.double() for t in found]
    for these in (found, expected):
        these[0].requires_grad_(True)
        these[1].requires_grad_(trained in ("weight", "both"))
        these[2].requires_grad_(trained in ("bias", "both"))
    logp = token_logprobs(found[0], found[1], targets, found[2], scale, cap)
    reference = plain(expected[0], expected[1], expected[2], targets, scale, cap)
    torch.testing.assert_close(logp.double(), reference, rtol=1e-5, atol=1e-6)
    (logp * factors).sum().backward()
    (reference * factors).sum().backward()
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        if mine.grad is not None and theirs.grad is not None:
            torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trained", [False, True])
def test_gradients_are_the_derivatives(trained: bool) -> None:
    hidden, weight, bias, targets, _ = made(torch.float64, 5)
    inputs = (hidden.requires_grad_(True), weight.requires_grad_(trained), bias.requires_grad_(trained))
    assert torch.autograd.gradcheck(lambda h, w, b: token_logprobs(h, w, targets, b, 1.5, 3.0), inputs)


def test_without_gradients_nothing_is_kept_and_values_are_the_same() -> None:
    hidden, weight, bias, targets, _ = made()
    with_gradients = token_logprobs(hidden.requires_grad_(True), weight, targets, bias)
    with torch.no_grad():
        without = token_logprobs(hidden, weight, targets, bias)
    assert with_gradients.requires_grad and not without.requires_grad
    assert torch.equal(with_gradients, without)


def test_a_head_that_is_called_learns_too() -> None:
    hidden, _, _, targets, factors = made()
    head = torch.nn.Sequential(torch.nn.Linear(8, 4, bias=False), torch.nn.Dropout(0.5), torch.nn.Linear(4, 50))
    torch.manual_seed(1)
    logp = token_logprobs_through(head, 50, hidden.requires_grad_(True), targets, 0.5, 2.0)
    (logp * factors).sum().backward()
    parameters = [hidden, *head.parameters()]
    found = [p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    torch.manual_seed(1)
    parts = [head(hidden[i : i + 7]) for i in range(0, 17, 7)]  # the same masks of dropout
    logits = torch.tanh(torch.cat(parts) * 0.5 / 2) * 2
    reference = torch.log_softmax(logits, -1)[torch.arange(17), targets]
    torch.testing.assert_close(logp, reference)
    (reference * factors).sum().backward()
    for mine, parameter in zip(found, parameters, strict=True):
        torch.testing.assert_close(mine, parameter.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trained", [False, True])
def test_half_precision_products_and_float32_behind_them(dtype: torch.dtype, trained: bool) -> None:
    """The error is that of the rounded product; the gradient of a scaled fp16 loss neither vanishes nor overflows."""
    hidden, weight, _, targets, _ = made()
    master = weight.to(dtype).float() if trained else weight.to(dtype)
    hidden = hidden.to(dtype).requires_grad_(True)
    with torch.autocast("cpu", dtype=dtype):
        logp = token_logprobs(hidden, master.requires_grad_(trained), targets)
    assert logp.dtype == torch.float32
    exact_hidden = hidden.detach().double().requires_grad_(True)
    exact_weight = weight.to(dtype).double().requires_grad_(trained)
    exact = plain(exact_hidden, exact_weight, None, targets, 1.0, None)
    bound = torch.finfo(dtype).eps
    torch.testing.assert_close(logp.double(), exact, rtol=0, atol=10 * bound)
    scale = 1024.0
    (logp.sum() * scale / 17).backward()
    (exact.sum() / 17).backward()
    pairs = [(hidden.grad, exact_hidden.grad)] + ([(master.grad, exact_weight.grad)] if trained else [])
    for found, expected in pairs:
        assert found is not None and expected is not None
        assert (found.double() / scale - expected).norm() < 4 * bound * expected.norm()


def test_entropy_by_hand() -> None:
    hidden = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.tensor([[0.0], [math.log(3)]])
    logp, entropy = token_logprobs_and_entropy(hidden, weight, torch.tensor([0]), entropy_grad=True)
    entropy.sum().backward()
    assert logp.item() == pytest.approx(-math.log(4), rel=1e-6)
    assert entropy.item() == pytest.approx(math.log(4) - 0.75 * math.log(3), rel=1e-6)
    assert hidden.grad is not None and hidden.grad.item() == pytest.approx(-0.2060 * math.log(3), abs=5e-5)


@pytest.mark.parametrize(("scale", "cap"), SHAPES)
@pytest.mark.parametrize("head", ["frozen", "trained", "called"])
@pytest.mark.parametrize("entropy_grad", [False, True])
def test_entropy_and_its_gradients_equal_those_of_all_logits(
    scale: float, cap: float | None, head: str, entropy_grad: bool
) -> None:
    hidden, weight, bias, targets, factors = made()
    found = [hidden, weight, bias]
    expected = [t.double() for t in found]
    for these in (found, expected):
        for tensor in these if head != "frozen" else these[:1]:
            tensor.requires_grad_(True)
    if head == "called":
        logp, entropy = token_logprobs_and_entropy_through(
            lambda h: functional.linear(h, found[1], found[2]), 50, found[0], targets, scale, cap, entropy_grad
        )
    else:
        logp, entropy = token_logprobs_and_entropy(*found[:2], targets, found[2], scale, cap, entropy_grad)
    assert torch.equal(logp, token_logprobs(*found[:2], targets, found[2], scale, cap)) or head == "called"
    logits = functional.linear(*expected) * scale
    logits = logits if cap is None else torch.tanh(logits / cap) * cap
    everything = logits.log_softmax(-1)
    reference = -(everything.exp() * everything).sum(-1)
    torch.testing.assert_close(entropy.double(), reference, rtol=1e-5, atol=1e-5)
    assert entropy.requires_grad == entropy_grad and (entropy >= 0).all()
    others = factors.flip(0)
    loss = (logp * factors).sum() + ((entropy * others).sum() if entropy_grad else 0)
    loss.backward()
    loss = (everything[torch.arange(17), targets] * factors).sum() + ((reference * others).sum() if entropy_grad else 0)
    loss.backward()
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        if mine.grad is not None and theirs.grad is not None:
            torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("entropy_grad", [False, True])
def test_gradients_of_entropies_are_the_derivatives(trained: bool, entropy_grad: bool) -> None:
    hidden, weight, bias, targets, _ = made(torch.float64, 5)
    inputs = (hidden.requires_grad_(True), weight.requires_grad_(trained), bias.requires_grad_(trained))

    def differentiable(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(t for t in token_logprobs_and_entropy(h, w, targets, b, 1.5, 3.0, entropy_grad) if t.requires_grad)

    assert len(differentiable(*inputs)) == 1 + entropy_grad
    assert torch.autograd.gradcheck(differentiable, inputs)


@pytest.mark.parametrize("head", ["frozen", "trained", "called"])
def test_a_token_that_is_ruled_out_has_no_part_in_the_entropy(head: str) -> None:
    hidden, weight, bias, targets, _ = made()
    targets.clamp_(max=48)
    bias[49] = -torch.inf
    hidden.requires_grad_(True)
    weight.requires_grad_(head == "trained")
    if head == "called":
        _, entropy = token_logprobs_and_entropy_through(
            lambda h: functional.linear(h, weight, bias), 50, hidden, targets, entropy_grad=True
        )
    else:
        _, entropy = token_logprobs_and_entropy(hidden, weight, targets, bias, entropy_grad=True)
    (found,) = torch.autograd.grad(entropy.sum(), hidden)
    _, expected = token_logprobs_and_entropy(hidden, weight[:49], targets, bias[:49], entropy_grad=True)
    torch.testing.assert_close(entropy, expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected.sum(), hidden)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_entropy_in_half_precision(dtype: torch.dtype) -> None:
    hidden, weight, _, targets, _ = made()
    hidden, weight = hidden.to(dtype).requires_grad_(True), weight.to(dtype)
    _, entropy = token_logprobs_and_entropy(hidden, weight, targets, entropy_grad=True)
    entropy.sum().backward()
    exact = hidden.detach().double().requires_grad_(True)
    everything = (exact @ weight.double().t()).log_softmax(-1)
    reference = -(everything.exp() * everything).sum(-1)
    reference.sum().backward()
    bound = torch.finfo(dtype).eps
    assert entropy.dtype == torch.float32 and hidden.grad is not None and exact.grad is not None
    torch.testing.assert_close(entropy.double(), reference, rtol=0, atol=10 * bound)
    assert (hidden.grad.double() - exact.grad).norm() < 4 * bound * exact.grad.norm()


def test_scores_for_evaluation() -> None:
    hidden, weight, bias, targets, _ = made()
    logits = functional.linear(hidden, weight, bias)
    targets[:5] = logits[:5].argmax(-1)
    logp, first = score_tokens(lambda h: functional.linear(h, weight, bias), 50, hidden, targets)
    torch.testing.assert_close(logp, plain(hidden, weight, bias, targets, 1.0, None))
    assert first.tolist() == (logits.argmax(-1) == targets).tolist() and first[:5].all()


def test_no_position_at_all() -> None:
    hidden, weight, bias, targets, _ = made(count=0)
    for found in (
        token_logprobs(hidden.requires_grad_(True), weight, targets, bias),
        token_logprobs(hidden, weight.requires_grad_(True), targets, bias),
        token_logprobs_through(lambda h: functional.linear(h, weight), 50, hidden, targets),
    ):
        assert found.shape == (0,) and found.dtype == torch.float32
        found.sum().backward()
    for logp, entropy in (
        token_logprobs_and_entropy(hidden, weight, targets, entropy_grad=True),
        token_logprobs_and_entropy_through(lambda h: functional.linear(h, weight), 50, hidden, targets, entropy_grad=True),
    ):
        assert logp.shape == entropy.shape == (0,)
        (logp.sum() + entropy.sum()).backward()
    logp, first = score_tokens(lambda h: functional.linear(h, weight), 50, hidden, targets)
    assert logp.shape == first.shape == (0,)

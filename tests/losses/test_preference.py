"""Every preference loss: the number worked by hand in its docstring, a version of its own in numpy, gradients."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from tunesmith.config.preferences import PREFERENCE_LOSSES
from tunesmith.config.preferences import REFERENCE_FREE_LOSSES as REFERENCE_FREE
from tunesmith.losses.preference import LOSSES, PairLogps, PreferenceOptions, preference_loss


def pairs(
    chosen: list[float], rejected: list[float], reference: tuple[list[float], list[float]] | None, tokens: list[int]
) -> PairLogps:
    values = [torch.tensor(v, dtype=torch.float64) for v in (chosen, rejected, tokens, tokens, *(reference or ()))]
    return PairLogps(*values)


def one(name: str) -> tuple[PairLogps, PreferenceOptions]:
    """The pair that docstrings speak of."""
    means = pairs([-1.0], [-2.0], None, [2])
    ratios = pairs([-1.0], [-3.0], ([-2.0], [-2.0]), [2])
    smoothing = 0.1 if name in ("robust", "exo_pair") else 0.0
    options = PreferenceOptions(beta=0.5, label_smoothing=smoothing, simpo_gamma=0.5, discopop_tau=1.0)
    return (means if name in REFERENCE_FREE else ratios), options


@pytest.mark.parametrize("name", [name for name in LOSSES if not name.startswith("aot")])
def test_the_number_of_the_docstring(name: str) -> None:
    text = (LOSSES[name].__doc__ or "").split("Example")[1]
    expected = float(re.findall(r"-?\d+\.?\d*", text.split("``.")[0].rstrip("`.\n "))[-1])
    assert LOSSES[name](*one(name)).item() == pytest.approx(expected, abs=6e-5)


def log_sigmoid(z: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0, -z)


def sigma(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


Numbers = dict[str, np.ndarray]
FROM_PAPERS: dict[str, Callable[[Numbers, float, float], np.ndarray]] = {
    "sigmoid": lambda v, b, e: -(1 - e) * log_sigmoid(b * (v["c"] - v["r"])) - e * log_sigmoid(b * (v["r"] - v["c"])),
    "sigmoid_norm": lambda v, b, e: -log_sigmoid(b * (v["c"] / v["n"] - v["r"] / v["m"])),
    "hinge": lambda v, b, e: np.maximum(0, 1 - b * (v["c"] - v["r"])),
    "ipo": lambda v, b, e: (v["c"] / v["n"] - v["r"] / v["m"] - 0.5 / b) ** 2,
    "robust": lambda v, b, e: (
        ((e - 1) * log_sigmoid(b * (v["c"] - v["r"])) + e * log_sigmoid(b * (v["r"] - v["c"]))) / (1 - 2 * e)
    ),
    "exo_pair": lambda v, b, e: sum(
        sigma(s * b * (v["c"] - v["r"])) * (log_sigmoid(s * b * (v["c"] - v["r"])) - np.log(p)) for s, p in ((1, 1 - e), (-1, e))
    ),
    "nca_pair": lambda v, b, e: (
        -log_sigmoid(b * v["c"]) - (log_sigmoid(-b * v["c"]) + log_sigmoid(-b * v["r"])) / 2
    ),
    "bco_pair": lambda v, b, e: -log_sigmoid(b * v["c"]) - log_sigmoid(-b * v["r"]),
    "sppo_hard": lambda v, b, e: (v["c"] - 0.5 / b) ** 2 + (v["r"] + 0.5 / b) ** 2,
    "apo_zero": lambda v, b, e: 1 - sigma(b * v["c"]) + sigma(b * v["r"]),
    "apo_down": lambda v, b, e: sigma(b * v["c"]) + 1 - sigma(b * (v["c"] - v["r"])),
    "discopop": lambda v, b, e: (
        (1 - sigma(b * (v["c"] - v["r"]) / 0.05)) * -log_sigmoid(b * (v["c"] - v["r"]))
        + sigma(b * (v["c"] - v["r"]) / 0.05) * np.exp(-b * (v["c"] - v["r"]))
    ),
    "kto_pair": lambda v, b, e: (
        (1 - sigma(b * (v["c"] - max(v["r"].mean(), 0))) + 1 - sigma(b * (max(v["c"].mean(), 0) - v["r"]))) / 2
    ),
    "aot": lambda v, b, e: (
        lambda d: -(1 - e) * log_sigmoid(b * d) - e * log_sigmoid(-b * d)
    )(np.sort(v["C"] - v["R"]) - np.sort((v["C"] - v["c"]) - (v["R"] - v["r"]))),
    "aot_unpaired": lambda v, b, e: (
        lambda d: -(1 - e) * log_sigmoid(b * d) - e * log_sigmoid(-b * d)
    )(np.sort(v["c"]) - np.sort(v["r"])),
    "orpo": lambda v, b, e: (
        lambda p, q: -np.log(p) - b * np.log(sigma(np.log(p / (1 - p)) - np.log(q / (1 - q))))
    )(np.exp(v["C"] / v["n"]), np.exp(v["R"] / v["m"])),
    "simpo": lambda v, b, e: (
        lambda z: -(1 - e) * log_sigmoid(z) - e * log_sigmoid(-z)
    )(b * (v["C"] / v["n"] - v["R"] / v["m"]) - 0.5),
    "cpo": lambda v, b, e: -(1 - e) * log_sigmoid(b * (v["C"] - v["R"])) - e * log_sigmoid(b * (v["R"] - v["C"])),
    "sft": lambda v, b, e: -v["C"] / v["n"],
}  # fmt: skip


def drawn(seed: int) -> tuple[PairLogps, Numbers]:
    generator = torch.Generator().manual_seed(seed)
    values = [-8 * torch.rand(6, generator=generator, dtype=torch.float64) - 0.1 for _ in range(4)]
    tokens = [torch.randint(1, 9, (6,), generator=generator) for _ in range(2)]
    made = PairLogps(values[0].requires_grad_(), values[1].requires_grad_(), *tokens, *values[2:])
    chosen, rejected, first, second = (value.detach().numpy() for value in values)
    numbers = {"C": chosen, "R": rejected, "c": chosen - first, "r": rejected - second}
    return made, {**numbers, "n": tokens[0].numpy(), "m": tokens[1].numpy()}


def cases() -> Iterator[tuple[str, float, float]]:
    for name in LOSSES:
        yield name, 0.1, 0.2
        yield name, 0.7, 0.01


@pytest.mark.parametrize(("name", "beta", "smoothing"), list(cases()))
def test_as_in_the_paper(name: str, beta: float, smoothing: float) -> None:
    made, numbers = drawn(3)
    found = LOSSES[name](made, PreferenceOptions(beta, smoothing))
    np.testing.assert_allclose(found.detach().numpy(), FROM_PAPERS[name](numbers, beta, smoothing), rtol=1e-9)
    if name != "kto_pair":  # its reference point takes no part in the gradient
        inputs = (made.chosen.detach().requires_grad_(), made.rejected.detach().requires_grad_())

        def loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
            moved = PairLogps(
                chosen, rejected, made.chosen_tokens, made.rejected_tokens, made.reference_chosen, made.reference_rejected
            )
            return LOSSES[name](moved, PreferenceOptions(beta, smoothing))

        assert torch.autograd.gradcheck(loss, inputs)


def test_losses_are_added_with_their_weights() -> None:
    made, _ = drawn(1)
    options = PreferenceOptions(0.3)
    mixed = preference_loss(made, {"sigmoid": 1.0, "sft": 0.25}, options)
    torch.testing.assert_close(mixed, LOSSES["sigmoid"](made, options) + 0.25 * LOSSES["sft"](made, options))


def test_configurations_know_the_same_names() -> None:
    assert tuple(LOSSES) == PREFERENCE_LOSSES


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("values", [(0.0, -1.0), (-1.0, 0.0), (0.0, 0.0), (-3000.0, -10.0), (-10.0, -3000.0)])
def test_certain_answers_and_far_ones_have_finite_gradients(name: str, values: tuple[float, float]) -> None:
    """In float32 a probability can be 1, and a log-ratio can be large."""
    made = [torch.tensor([value], requires_grad=True) for value in values]
    two, reference = torch.tensor([2.0]), torch.tensor([-5.0])
    loss = LOSSES[name](PairLogps(*made, two, two, reference, reference), PreferenceOptions(0.1, 0.1)).sum()
    gradients = [found for found in torch.autograd.grad(loss, made, allow_unused=True) if found is not None]
    assert all(found.isfinite().all() for found in (loss, *gradients))

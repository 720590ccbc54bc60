"""The optimizers by name: which settings each of them heeds, which options ``optim_args`` may hold, what it needs.

What they do is in ``train/optimizer.py``; this table lets a configuration be judged before anything is loaded.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Literal

Scalar = bool | int | float | str
AdamKey = Literal["adam_beta1", "adam_beta2", "adam_epsilon"]

OptimizerName = Literal[
    "adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "adafactor", "lion", "lion_32bit", "muon",
    "galore_adamw", "apollo_adamw", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw", "paged_adamw_32bit", "paged_adamw_8bit",
    "lion_8bit", "paged_lion_32bit", "paged_lion_8bit", "rmsprop_bnb", "rmsprop_bnb_32bit", "rmsprop_bnb_8bit",
    "schedule_free_adamw", "schedule_free_radam", "schedule_free_sgd",
]  # fmt: skip
"""Names as Transformers spells them (``adamw_8bit`` and ``paged_adamw`` are its aliases); ``lion`` is ``lion_32bit``, and
``muon`` is ours."""


@dataclass(frozen=True)
class Option:
    """One key of ``optim_args``: its default, which also fixes the type, and the values allowed."""

    default: Scalar
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()

    def read(self, value: Scalar) -> Scalar:
        """The value in the option's type, from YAML's value or from the text of ``key=value``.

        Raises:
            ValueError: says what was expected.
        """
        if self.choices:
            if value not in self.choices:
                raise ValueError(f"expected {' or '.join(self.choices)}")
            return value
        if isinstance(self.default, bool):
            flags = {"true": True, "false": False}
            if str(value).lower() not in flags:
                raise ValueError("expected true or false")
            return flags[str(value).lower()]
        kind = type(self.default)
        try:
            number = float("nan") if isinstance(value, bool) else float(value)
        except ValueError:
            number = float("nan")
        low, high = (float("-inf") if self.low is None else self.low), (float("inf") if self.high is None else self.high)
        if not (isfinite(number) and low <= number <= high and number == kind(number)):
            bounds = [f"at least {low:g}"] * isfinite(low) + [f"at most {high:g}"] * isfinite(high)
            raise ValueError(f"expected a {'whole ' * (kind is int)}number, {', '.join(bounds) or 'of any size'}")
        return kind(number)


@dataclass(frozen=True)
class Optimizer:
    """What a configuration has to know of an optimizer.

    Attributes:
        heeds: the ``adam_*`` keys that it uses.
        options: what ``optim_args`` may hold.
        library: importable name of the package it comes from, if that is an extra.
        projects: works on projections of whole matrices: for full training; takes ``optim_target_modules``.
        averages: keeps an average of the weights in place of a falling learning rate.
        paged: moves its state to the host when GPU memory runs short.
    """

    heeds: frozenset[AdamKey] = frozenset()
    options: Mapping[str, Option] = field(default_factory=dict)
    library: str | None = None
    projects: bool = False
    averages: bool = False
    paged: bool = False


_ADAM: frozenset[AdamKey] = frozenset({"adam_beta1", "adam_beta2", "adam_epsilon"})
_BETAS: frozenset[AdamKey] = frozenset({"adam_beta1", "adam_beta2"})
_PROJECTION = {"rank": Option(128, 1), "update_proj_gap": Option(200, 1)}
_SMALLEST = {"min_8bit_size": Option(4096, 1)}
_AVERAGE = {"r": Option(0.0, 0), "weight_lr_power": Option(2.0, 0)}
_MOMENTUM = Option(0.0, 0, 1)
_ALPHA = Option(0.99, 1e-6, 1)
_BNB = "bitsandbytes"

_ADAMW = Optimizer(_ADAM)
_LION = Optimizer(_BETAS)
_ADAMW_8 = Optimizer(_ADAM, _SMALLEST, _BNB)
_RMSPROP = Optimizer(options={"alpha": _ALPHA, "eps": Option(1e-8, 0)}, library=_BNB)

OPTIMIZERS: Mapping[str, Optimizer] = {
    "adamw_torch": _ADAMW,
    "adamw_torch_fused": _ADAMW,
    "sgd": Optimizer(options={"momentum": _MOMENTUM, "dampening": Option(0.0, 0, 1), "nesterov": Option(False)}),
    "adagrad": Optimizer(options={"lr_decay": Option(0.0, 0), "eps": Option(1e-10, 0)}),
    "rmsprop": Optimizer(options={"alpha": _ALPHA, "momentum": _MOMENTUM, "eps": Option(1e-8, 0), "centered": Option(False)}),
    "adafactor": Optimizer(
        options={"clip_threshold": Option(1.0, 1e-6), "decay_rate": Option(-0.8, -1, 0), "scale_parameter": Option(False)}
    ),
    "lion": _LION,
    "lion_32bit": _LION,
    "muon": Optimizer(
        _ADAM,
        {
            "momentum": Option(0.95, 0, 1),
            "nesterov": Option(True),
            "ns_steps": Option(5, 1, 99),
            "adjust_lr_fn": Option("match_rms_adamw", choices=("match_rms_adamw", "original")),
        },
    ),
    "galore_adamw": Optimizer(_ADAM, {**_PROJECTION, "scale": Option(0.25, 1e-6)}, projects=True),
    "apollo_adamw": Optimizer(
        _ADAM,
        {**_PROJECTION, "scale": Option(1.0, 1e-6), "scale_type": Option("channel", choices=("channel", "tensor"))},
        projects=True,
    ),
    "adamw_8bit": _ADAMW_8,
    "adamw_bnb_8bit": _ADAMW_8,
    "paged_adamw": Optimizer(_ADAM, library=_BNB, paged=True),
    "paged_adamw_32bit": Optimizer(_ADAM, library=_BNB, paged=True),
    "paged_adamw_8bit": Optimizer(_ADAM, _SMALLEST, _BNB, paged=True),
    "lion_8bit": Optimizer(_BETAS, _SMALLEST, _BNB),
    "paged_lion_32bit": Optimizer(_BETAS, library=_BNB, paged=True),
    "paged_lion_8bit": Optimizer(_BETAS, _SMALLEST, _BNB, paged=True),
    "rmsprop_bnb": _RMSPROP,
    "rmsprop_bnb_32bit": _RMSPROP,
    "rmsprop_bnb_8bit": Optimizer(options={**_RMSPROP.options, **_SMALLEST}, library=_BNB),
    "schedule_free_adamw": Optimizer(_ADAM, _AVERAGE, "schedulefree", averages=True),
    "schedule_free_radam": Optimizer(_ADAM, _AVERAGE, "schedulefree", averages=True),
    "schedule_free_sgd": Optimizer(
        options={**_AVERAGE, "momentum": Option(0.9, 1e-6, 0.999999)}, library="schedulefree", averages=True
    ),
}
"""Every optimizer by name."""

EXTRA = "optim"
"""The extra of this package that brings the libraries of all of them."""


def read_options(name: str, given: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """All options of an optimizer: those given, in their types, and the defaults of the others.

    Raises:
        ValueError: for the first option that it does not have, or whose value does not fit.
    """
    options = OPTIMIZERS[name].options
    values = {key: option.default for key, option in options.items()}
    for key, value in given.items():
        if key not in options:
            raise ValueError(f"{name} has no option {key}; it has {', '.join(options) or 'none'}")
        try:
            values[key] = options[key].read(value)
        except ValueError as error:
            raise ValueError(f"{key}: {error}, found {value!r}") from None
    return values


def missing_library(name: str) -> str | None:
    """What to do about the package that an optimizer needs, if it is not installed."""
    library = OPTIMIZERS[name].library
    if library is None or importlib.util.find_spec(library):
        return None
    return f"{name} needs the package {library}, which is not installed: pip install 'tunesmith[{EXTRA}]'"


def unheeded(name: str) -> Iterator[AdamKey]:
    """The ``adam_*`` keys that an optimizer does not use."""
    yield from sorted(_ADAM - OPTIMIZERS[name].heeds)

"""Optimizers that train at one point and are used at another: the weights are exchanged, bit by bit, and back.

Schedule-free optimizers (arXiv 2405.15682) take gradients at ``y`` and answer with the average ``x``, which the library
computes from ``y`` and its state. Computing ``y`` back from ``x`` would round, and training would depend on how often it
was evaluated or saved; so ``y`` is kept aside while ``x`` is in place, also in a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch

_ASIDE = "training_point"


def _averages(optimizer: torch.optim.Optimizer) -> bool:
    return "train_mode" in optimizer.param_groups[0]


@torch.no_grad()
def use_average(optimizer: torch.optim.Optimizer) -> None:
    """Put the averaged weights in place, for evaluation, saving and answers. Others than averaging optimizers: nothing."""
    if not _averages(optimizer) or not optimizer.param_groups[0]["train_mode"]:
        return
    for state, p in _started(optimizer):
        state[_ASIDE] = p.detach().clone()
    cast(Any, optimizer).eval()


@torch.no_grad()
def use_training_point(optimizer: torch.optim.Optimizer) -> None:
    """Put the weights in place at which gradients are taken."""
    if not _averages(optimizer) or optimizer.param_groups[0]["train_mode"]:
        return
    cast(Any, optimizer).train()
    for state, p in _started(optimizer):
        p.copy_(state.pop(_ASIDE))


@contextmanager
def averaged(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """The averaged weights within; what was in place before comes back after."""
    training = optimizer.param_groups[0].get("train_mode", False)
    use_average(optimizer)
    try:
        yield
    finally:
        if training:
            use_training_point(optimizer)


def _started(optimizer: torch.optim.Optimizer) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
    for group in optimizer.param_groups:
        for p in group["params"]:
            if "z" in (state := optimizer.state.get(p, {})):
                yield state, p

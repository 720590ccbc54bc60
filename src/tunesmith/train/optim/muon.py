"""Muon for the matrices between embedding and head, AdamW for everything else, as one optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch


class MuonWithAdamW(torch.optim.Optimizer):
    """``torch.optim.Muon`` (arXiv 2502.16982) and ``torch.optim.AdamW`` over one list of groups and one state.

    Args:
        matrices: groups of two-dimensional parameters, for Muon.
        others: groups for AdamW.
        lr: rate of groups that have none of their own.
        muon: further arguments of Muon.
        adamw: further arguments of AdamW.
    """

    def __init__(
        self,
        matrices: Sequence[dict[str, Any]],
        others: Sequence[dict[str, Any]],
        lr: float,
        muon: Mapping[str, Any],
        adamw: Mapping[str, Any],
    ) -> None:
        self._parts: list[tuple[torch.optim.Optimizer, int]] = []
        if matrices:
            self._parts.append((torch.optim.Muon(matrices, lr=lr, **muon), len(matrices)))
        if others:
            self._parts.append((torch.optim.AdamW(others, lr=lr, **adamw), len(others)))
        super().__init__([group for part, _ in self._parts for group in part.param_groups], {"lr": lr})
        self._share()

    def _share(self) -> None:
        """Let the parts work on this optimizer's own groups and state."""
        begin = 0
        for part, count in self._parts:
            part.param_groups = self.param_groups[begin : begin + count]
            part.state = self.state
            begin += count

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        for part, _ in self._parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what ``state_dict`` gave. Raises ValueError when it does not fit."""
        super().load_state_dict(state_dict)
        self._share()

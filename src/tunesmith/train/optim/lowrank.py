"""AdamW whose moments are kept for a low-rank projection of each gradient: GaLore and APOLLO.

Groups with a ``rank`` are projected, the others are plain AdamW. A matrix is projected along its shorter side.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import sqrt
from typing import Any

import torch


class _ProjectedAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) in a projection that subclasses make, whose result they bring back to full size."""

    def __init__(
        self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float, **options: Any
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.options = options

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(group, p, p.grad)

    def _update(self, group: dict[str, Any], p: torch.Tensor, gradient: torch.Tensor) -> None:
        state, rank = self.state[p], group.get("rank")
        if rank is not None:
            rank = min(rank, *p.shape)
        step = state.get("step", 0)
        low = gradient if rank is None else self._project(state, gradient, rank, step % self.options["update_proj_gap"] == 0)
        if step == 0:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(low), torch.zeros_like(low)
        state["step"] = step = step + 1
        beta1, beta2 = group["betas"]
        first = state["exp_avg"].lerp_(low, 1 - beta1) / (1 - beta1**step)
        second = state["exp_avg_sq"].mul_(beta2).addcmul_(low, low, value=1 - beta2) / (1 - beta2**step)
        direction = first.div_(second.sqrt_().add_(group["eps"]))
        if rank is not None:
            direction = self._restore(state, gradient, low, direction)
        p.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])

    def _project(self, state: dict[str, Any], gradient: torch.Tensor, rank: int, renew: bool) -> torch.Tensor:
        """The gradient ``[m, n]`` as ``[rank, n]`` if ``m <= n``, else as ``[m, rank]``."""
        raise TypeError(f"{type(self).__name__} does not say how it projects")

    def _restore(
        self, state: dict[str, Any], gradient: torch.Tensor, low: torch.Tensor, direction: torch.Tensor
    ) -> torch.Tensor:
        """The full-size direction, from the gradient, its projection and AdamW's direction for the projection."""
        raise TypeError(f"{type(self).__name__} does not say how it goes back")


def _is_wide(matrix: torch.Tensor) -> bool:
    return matrix.shape[0] <= matrix.shape[1]


class GaLoreAdamW(_ProjectedAdamW):
    """GaLore (arXiv 2403.03507, algorithm 2): AdamW in the gradient's leading singular subspace.

    The subspace is taken anew every ``update_proj_gap`` updates; ``direction = scale * P N`` with ``N`` AdamW's direction
    for ``P^T G``. State: the projection ``[m, rank]`` and two moments of the projected shape.
    """

    def _project(self, state: dict[str, Any], gradient: torch.Tensor, rank: int, renew: bool) -> torch.Tensor:
        wide = _is_wide(gradient)
        if renew:
            left, _, right = torch.linalg.svd(gradient.float(), full_matrices=False)
            state["basis"] = (left[:, :rank] if wide else right[:rank].T).to(gradient.dtype).contiguous()
        basis = state["basis"]
        return basis.T @ gradient if wide else gradient @ basis

    def _restore(
        self, state: dict[str, Any], gradient: torch.Tensor, low: torch.Tensor, direction: torch.Tensor
    ) -> torch.Tensor:
        basis = state["basis"]
        full = basis @ direction if _is_wide(gradient) else direction @ basis.T
        return full.mul_(self.options["scale"])


_GROWTH = 1.01
"""How much longer than the update before an update of APOLLO may be (section 4 of the paper, after arXiv 2410.01623)."""


class ApolloAdamW(_ProjectedAdamW):
    """APOLLO (arXiv 2412.05270, algorithm 1): the raw gradient, scaled as AdamW would scale it.

    AdamW runs on a random projection ``R = P G``, ``P`` normal with variance ``1 / rank``; how much longer its direction is
    than ``R``, per channel (``scale_type: channel``) or for the matrix (``tensor``, APOLLO-Mini with rank 1), is the factor
    of ``G``. ``scale`` is meant as Transformers' option of that name: updates are multiplied by its square root. The
    projection is drawn again from its seed when it is needed, so that only the moments are kept.
    """

    def _project(self, state: dict[str, Any], gradient: torch.Tensor, rank: int, renew: bool) -> torch.Tensor:
        if renew:
            state["seed"] = int(torch.randint(2**53, ()))
        generator = torch.Generator(gradient.device).manual_seed(state["seed"])
        wide = _is_wide(gradient)
        shape = (rank, gradient.shape[0]) if wide else (gradient.shape[1], rank)
        projection = torch.randn(shape, generator=generator, device=gradient.device, dtype=gradient.dtype).div_(sqrt(rank))
        return projection @ gradient if wide else gradient @ projection

    def _restore(
        self, state: dict[str, Any], gradient: torch.Tensor, low: torch.Tensor, direction: torch.Tensor
    ) -> torch.Tensor:
        if self.options["scale_type"] == "channel":
            side = 0 if _is_wide(gradient) else 1
            factor = direction.norm(dim=side, keepdim=True) / (low.norm(dim=side, keepdim=True) + 1e-8)
        else:
            factor = direction.norm() / (low.norm() + 1e-8)
        full = gradient * factor
        length = full.norm()
        if "length" in state:
            allowed = _GROWTH * state["length"]
            full *= torch.where(length > allowed, allowed / (length + 1e-8), 1.0)
            length = torch.minimum(length, allowed)
        state["length"] = length
        return full.mul_(sqrt(self.options["scale"]))

"""One update: forward and backward over a window of micro-batches, one division, one clip, one optimizer step.

Gradients of summed losses are accumulated and divided once by the count of the whole window, so that splitting the
same rows into more micro-batches, or rows of uneven length, never changes the objective.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tunesmith.errors import NonFiniteError
from tunesmith.types import Batch, LossOutput

ComputeLoss = Callable[[Batch], LossOutput]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one update did.

    Attributes:
        loss_sum: summed loss of the window.
        count: terms in that sum; ``loss_sum / count`` is the loss.
        grad_norm: L2 norm of the gradient of the mean loss, before clipping.
        num_tokens: real tokens computed.
        skipped: True when fp16 overflowed and the update was left out.
    """

    loss_sum: float
    count: int
    grad_norm: float
    num_tokens: int
    skipped: bool = False


class Updater:
    """Owns the only ``backward`` and the only ``optimizer.step`` of the package.

    Args:
        optimizer: over the trainable parameters.
        max_grad_norm: clip to this norm; 0 never clips.
        scaler: loss scaling for fp16, else None.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, max_grad_norm: float, scaler: torch.amp.GradScaler | None = None
    ) -> None:
        self.optimizer = optimizer
        self.max_grad_norm = max_grad_norm
        self.scaler = scaler
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def update(self, window: Sequence[Batch], compute_loss: ComputeLoss, step: int) -> StepResult:
        """Train on one window.

        Args:
            window: micro-batches.
            compute_loss: forward pass of the stage.
            step: number of the update, for messages.

        Raises:
            NonFiniteError: the loss or gradient is not finite; nothing has been updated.
        """
        loss_sum, count = 0.0, 0
        for batch in window:
            output = compute_loss(batch)
            value = output.sum.item()
            if not torch.isfinite(output.sum):
                rows = ", ".join(str(s) for s in batch.sources)
                raise NonFiniteError(f"step {step}: the loss is {value}; nothing was updated. Rows: {rows}")
            loss_sum += value
            count += output.count
            scaled = self.scaler.scale(output.sum) if self.scaler else output.sum
            scaled.backward()
        grad_norm, skipped = self._apply(count, step, window)
        return StepResult(loss_sum, count, grad_norm, sum(b.num_tokens for b in window), skipped)

    def _apply(self, count: int, step: int, window: Sequence[Batch]) -> tuple[float, bool]:
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).item() / count
        finite = norm == norm and norm != float("inf")
        if not finite and not self.scaler:
            rows = ", ".join(str(s) for batch in window for s in batch.sources)
            raise NonFiniteError(f"step {step}: the gradient norm is {norm}; nothing was updated. Rows: {rows}")
        factor = 1.0 / count
        if finite and self.max_grad_norm and norm > self.max_grad_norm:
            factor *= self.max_grad_norm / norm
        torch._foreach_mul_(gradients, factor)
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, not finite

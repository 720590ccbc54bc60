"""One update: forward and backward over a window of micro-batches, one division, one clip, one optimizer step.

Each micro-batch's summed loss is divided by the count of the whole window, so that splitting the same rows into more
micro-batches, or rows of uneven length, never changes the objective.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from tunesmith.errors import NonFiniteError
from tunesmith.types import Batch, LossOutput

ComputeLoss = Callable[[Batch], LossOutput]
_MOST_SKIPPED = 20
"""Updates in a row that fp16 may leave out while the loss scale settles."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one update did.

    Attributes:
        loss_sum: summed loss of the window.
        count: terms in that sum; ``loss_sum / count`` is the loss.
        grad_norm: L2 norm of the gradient of the mean loss, before clipping.
        num_tokens: real tokens computed.
        metrics: name -> (sum, count) of whatever the stage measures besides.
        skipped: True when fp16 overflowed and the update was left out.
    """

    loss_sum: float
    count: float
    grad_norm: float
    num_tokens: int
    metrics: Mapping[str, tuple[float, int]] = field(default_factory=dict)
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
        self._skipped = 0
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
        count = math.fsum(batch.total_weight for batch in window) or 1.0  # where nothing counts, nothing is learned
        outputs = [self._accumulate(batch, compute_loss, count) for batch in window]
        losses = torch.stack([output.sum for output in outputs]).tolist()
        for loss, batch in zip(losses, window, strict=True):
            if not math.isfinite(loss):
                self.optimizer.zero_grad(set_to_none=True)
                raise NonFiniteError(f"step {step}: the loss is {loss}; nothing was updated. Rows: {_rows([batch])}")
        grad_norm = self._apply(step, window)
        tokens = sum(batch.num_tokens for batch in window)
        metrics = add_metrics(*(output.metrics for output in outputs))
        return StepResult(math.fsum(losses), count, grad_norm, tokens, metrics, not math.isfinite(grad_norm))

    def _accumulate(self, batch: Batch, compute_loss: ComputeLoss, count: float) -> LossOutput:
        """Add the gradient of the batch's share in a mean over ``count`` terms."""
        output = compute_loss(batch)
        assert output.count == batch.total_weight, (output.count, batch.total_weight)
        mean = output.sum / count
        (self.scaler.scale(mean) if self.scaler else mean).backward()
        return replace(output, sum=output.sum.detach())

    def rehearse(self, batch: Batch, compute_loss: ComputeLoss, accumulates: bool) -> None:
        """Forward and backward of a batch for the memory that they take; gradients and random numbers are as before.

        Args:
            batch: a micro-batch.
            compute_loss: forward pass of the stage.
            accumulates: whether gradients of earlier micro-batches are there when a batch is run.
        """
        if accumulates:
            for parameter in self._parameters:
                parameter.grad = torch.zeros_like(parameter)
        try:
            with torch.random.fork_rng():
                self._accumulate(batch, compute_loss, batch.total_weight)
        finally:
            self.optimizer.zero_grad(set_to_none=True)

    def _apply(self, step: int, window: Sequence[Batch]) -> float:
        """Clip and step; returns the gradient norm, which is not finite where fp16 overflowed and nothing was updated."""
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).item()
        if math.isfinite(norm):
            self._skipped = 0
        else:
            self._skipped += 1
            if not self.scaler or self._skipped > _MOST_SKIPPED:
                self.optimizer.zero_grad(set_to_none=True)
                raise NonFiniteError(f"step {step}: the gradient norm is {norm}; nothing was updated. Rows: {_rows(window)}")
        if self.max_grad_norm and norm > self.max_grad_norm:
            torch._foreach_mul_(gradients, self.max_grad_norm / norm)
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm


def add_metrics(*parts: Mapping[str, tuple[float, int]]) -> dict[str, tuple[float, int]]:
    """Sums and counts of several batches, added by name.

    Example:
        ``{"a": (1.0, 2)}`` and ``{"a": (2.0, 3)}`` -> ``{"a": (3.0, 5)}``.
    """
    total: dict[str, tuple[float, int]] = {}
    for part in parts:
        for name, (value, number) in part.items():
            before = total.get(name, (0.0, 0))
            total[name] = (before[0] + value, before[1] + number)
    return total


def means(metrics: Mapping[str, tuple[float, int]]) -> dict[str, float]:
    """Name -> mean."""
    return {name: value / number for name, (value, number) in metrics.items()}


def _rows(window: Sequence[Batch]) -> str:
    return ", ".join(dict.fromkeys(str(source) for batch in window for source in batch.sources))  # of a pair there are two

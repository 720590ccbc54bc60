"""The data that flows between the rooms: messages, examples, batches, losses.

Shape suffixes used in the package: ``T`` tokens of a flat batch, ``S`` supervised tokens, ``V`` vocabulary,
``B`` rows of a padded batch, ``L`` padded length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    import torch

IGNORE_INDEX = -100
"""Label of a token that is not learned."""

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Source:
    """Where a row comes from, so that any later message can name it.

    Attributes:
        dataset: name in ``dataset_info.json``.
        file: path of the file as the user would open it.
        row: 1-based row number in the file.
        line: 1-based line on which the row begins.
    """

    dataset: str
    file: str
    row: int
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line} (row {self.row})"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """A dialogue; every assistant turn is to be learned."""

    messages: tuple[Message, ...]
    source: Source


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised row.

    Attributes:
        input_ids: int32 array ``[L]``.
        labels: int32 array ``[L]``, aligned with ``input_ids`` (not shifted), ``IGNORE_INDEX`` where unsupervised.
        source: the row it was made from.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    source: Source

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, slots=True)
class Batch:
    """Several examples laid end to end, without padding.

    Attributes:
        input_ids_T: int64 ``[T]``.
        position_ids_T: int64 ``[T]``, restarting at 0 with each example.
        positions_S: int64 ``[S]``, where a supervised token is predicted.
        targets_S: int64 ``[S]``, the tokens to predict there.
        lengths: tokens of each example; sums to ``T``.
        sources: the rows, in the order of ``lengths``.
    """

    input_ids_T: torch.Tensor
    position_ids_T: torch.Tensor
    positions_S: torch.Tensor
    targets_S: torch.Tensor
    lengths: tuple[int, ...]
    sources: tuple[Source, ...]

    @property
    def num_tokens(self) -> int:
        """Real tokens in the batch; there are no others."""
        return sum(self.lengths)

    @property
    def num_targets(self) -> int:
        """Supervised tokens: what a token-level loss is divided by."""
        return self.targets_S.numel()

    def to(self, device: torch.device) -> Batch:
        """Return the batch with its tensors on ``device``."""
        return Batch(
            self.input_ids_T.to(device, non_blocking=True),
            self.position_ids_T.to(device, non_blocking=True),
            self.positions_S.to(device, non_blocking=True),
            self.targets_S.to(device, non_blocking=True),
            self.lengths,
            self.sources,
        )


@dataclass(frozen=True, slots=True)
class LossOutput:
    """What a stage's ``compute_loss`` returns: sums, never means, so that the loop divides once.

    Attributes:
        sum: scalar tensor, the loss summed over what is counted.
        count: how many terms were summed (supervised tokens for SFT).
        metrics: name -> (sum, count) of further quantities to log.
    """

    sum: torch.Tensor
    count: int
    metrics: Mapping[str, tuple[float, int]] = field(default_factory=dict)

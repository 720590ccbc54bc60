"""Padded batches, for generation and for models whose attention cannot take rows end to end.

Pads are known by their position, never by their value: a real end-of-sequence token whose id equals the pad id stays
attended to and supervised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from tunesmith.types import IGNORE_INDEX, Example, PairExample


@dataclass(frozen=True)
class DynamicDataCollatorWithPadding:
    """Pads each batch to its own longest row.

    Args:
        tokenizer: gives the pad id (any id does; 0 where it has none).
        padding_side: ``left`` for training, evaluation and generation alike; ``right`` where a model wants it.
        pad_to_multiple_of: round the common length up.
    """

    tokenizer: PreTrainedTokenizerBase
    padding_side: Literal["left", "right"] = "left"
    pad_to_multiple_of: int = 1

    def __call__(self, features: Sequence[Example | Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Pad rows.

        Args:
            features: examples, or mappings with ``input_ids`` and, optionally, ``labels`` of the same length.

        Returns:
            int64 ``input_ids``, ``attention_mask``, ``position_ids`` (from 0 at the first real token) and, if the rows
            have them, ``labels`` (``IGNORE_INDEX`` at pads), each ``[B, L]``.

        Raises:
            ValueError: no rows, a row without tokens, or labels of another length than the ids.
        """
        rows = [_columns(feature) for feature in features]
        if not rows or any(len(ids) == 0 for ids, _ in rows):
            raise ValueError("a batch needs at least one row, and every row at least one token")
        if any(labels is not None and len(labels) != len(ids) for ids, labels in rows):
            raise ValueError("labels must have as many entries as input_ids; they are shifted later, in one place")
        longest = max(len(ids) for ids, _ in rows)
        longest += -longest % self.pad_to_multiple_of
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        lengths = torch.tensor([len(ids) for ids, _ in rows])
        offsets_BL = torch.arange(longest)[None] - (longest - lengths[:, None] if self.padding_side == "left" else 0)
        real_BL = (offsets_BL >= 0) & (offsets_BL < lengths[:, None])
        batch = {
            "input_ids": self._lay([ids for ids, _ in rows], longest, pad),
            "attention_mask": real_BL.long(),
            "position_ids": offsets_BL.clamp(min=0) * real_BL,
        }
        labels = [label for _, label in rows if label is not None]
        if len(labels) == len(rows):
            batch["labels"] = self._lay(labels, longest, IGNORE_INDEX)
        elif labels:
            raise ValueError("some rows have labels and some have none")
        return batch

    def _lay(self, rows: Sequence[np.ndarray], longest: int, filler: int) -> torch.Tensor:
        laid = np.full((len(rows), longest), filler, dtype=np.int64)
        for target, row in zip(laid, rows, strict=True):
            target[slice(longest - len(row), None) if self.padding_side == "left" else slice(0, len(row))] = row
        return torch.from_numpy(laid)


@dataclass(frozen=True)
class PairwiseDataCollatorWithPadding(DynamicDataCollatorWithPadding):
    """n preference pairs -> 2n rows of one length: first the n chosen answers, then the n rejected ones."""

    def __call__(self, features: Sequence[Any]) -> dict[str, torch.Tensor]:
        """Pad pairs.

        Args:
            features: ``PairExample``, or mappings whose ``chosen`` and ``rejected`` are rows.

        Returns:
            As for single rows, ``[2n, L]``.
        """
        pairs = [(f.chosen, f.rejected) if isinstance(f, PairExample) else (f["chosen"], f["rejected"]) for f in features]
        return super().__call__([*(chosen for chosen, _ in pairs), *(rejected for _, rejected in pairs)])


def _columns(feature: Example | Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray | None]:
    if isinstance(feature, Example):
        return feature.input_ids, feature.labels
    labels = feature.get("labels")
    return np.asarray(feature["input_ids"]), None if labels is None else np.asarray(labels)

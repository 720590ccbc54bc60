"""Examples -> ``Batch``: laid end to end, no padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tunesmith.types import Batch, Example


def collate(examples: Sequence[Example]) -> Batch:
    """Join examples into one flat batch; positions restart with each of them."""
    return Batch(
        input_ids_T=torch.from_numpy(np.concatenate([e.input_ids for e in examples]).astype(np.int64)),
        position_ids_T=torch.cat([torch.arange(len(e)) for e in examples]),
        labels_T=torch.from_numpy(np.concatenate([e.labels for e in examples]).astype(np.int64)),
        lengths=tuple(len(e) for e in examples),
        sources=tuple(e.source for e in examples),
    )

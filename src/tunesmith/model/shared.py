"""Rows that begin alike, the two of a pair or several answers to a prompt: what they begin with is computed once.

The first of them lies in the flat batch whole, as any row. Of the others only what is their own lies there; it attends to the
common tokens where they are, and goes on with their positions. Whatever is asked for at a common token of such a row is that of
the first row: the same tokens in the same places before it.

``V`` tokens of the rows, ``T`` of them computed, ``B`` rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tunesmith.types import Batch


@dataclass(frozen=True)
class Layout:
    """Which tokens are computed, and where those of each row are among them.

    Attributes:
        tokens_T: int64, numbers of the tokens that are computed.
        places_V: int64, for each token of the rows its place among those.
        lengths: tokens of each row that are computed for itself; sums to ``T``.
        before_B2: int32 on the host, begin and end among the computed tokens of what comes before these.
    """

    tokens_T: torch.Tensor
    places_V: torch.Tensor
    lengths: tuple[int, ...]
    before_B2: torch.Tensor


def layout(batch: Batch) -> Layout | None:
    """The layout of a batch in which rows begin alike; None if none do.

    Example:
        Rows ``[a b c]`` and ``[a b d]`` with ``begins_like = ((0, 0), (0, 2))``: tokens ``[0, 1, 2, 5]``, places
        ``[0, 1, 2, 0, 1, 3]``, lengths ``(3, 1)``, before ``[[0, 0], [0, 2]]``.
    """
    if not batch.num_repeated:
        return None
    lengths, like = np.array(batch.lengths), np.array(batch.begins_like)
    assert like.shape == (len(lengths), 2), (like.shape, len(lengths))
    owners, common = like.T
    assert (common < lengths).all(), "a row needs a token of its own"
    assert (common[owners[common > 0]] == 0).all(), "a row that others begin like begins like no other"
    starts_B = np.cumsum(lengths) - lengths
    own_B = lengths - common
    begins_B = np.cumsum(own_B) - own_B
    within_V = np.arange(lengths.sum()) - np.repeat(starts_B, lengths)
    repeated_V = within_V < np.repeat(common, lengths)
    places_V = np.where(repeated_V, np.repeat(begins_B[owners], lengths), np.repeat(begins_B - common, lengths)) + within_V
    before_B2 = np.stack([begins_B[owners], begins_B[owners] + common], axis=1)
    before_B2[common == 0] = 0
    device = batch.input_ids_T.device
    return Layout(
        torch.from_numpy(np.flatnonzero(~repeated_V)).to(device),
        torch.from_numpy(places_V).to(device),
        tuple(own_B.tolist()),
        torch.from_numpy(before_B2.astype(np.int32)),
    )

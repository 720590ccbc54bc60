"""Examples -> ``Batch``: laid end to end, no padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from tunesmith.types import IGNORE_INDEX, Batch, Example, FeedbackExample, PairExample


def collate(examples: Sequence[Example | PairExample | FeedbackExample]) -> Batch:
    """Join examples into one flat batch; positions restart with each of them.

    Of ``n`` pairs it has 2n rows, the better answers first, and counts n: a pair is one term of a loss. Of feedback it has
    a row for each, and those with mismatched answers in a batch of their own, because they are run without gradients.
    """
    if feedback := [example for example in examples if isinstance(example, FeedbackExample)]:
        return _feedback(feedback)
    pairs = [example for example in examples if isinstance(example, PairExample)]
    if pairs:
        both = _join([pair.chosen for pair in pairs] + [pair.rejected for pair in pairs])
        known = [pair.reference for pair in pairs if pair.reference is not None]
        assert len(known) in (0, len(pairs)), "some pairs have no reference"
        margins = [pair.margin for pair in pairs]
        return replace(
            both,
            total_weight=float(len(pairs)),
            reference_2P=torch.tensor(known).T if known else None,
            begins_like=(*((0, 0) for _ in pairs), *((row, pair.common) for row, pair in enumerate(pairs))),
            margins_P=torch.tensor(margins) if any(margins) else None,
        )
    return _join([example for example in examples if isinstance(example, Example)])


def _feedback(rows: Sequence[FeedbackExample]) -> Batch:
    mismatched = [row.mismatched for row in rows if row.mismatched is not None]
    known = [row.reference for row in rows if row.reference is not None]
    assert {len(mismatched), len(known)} <= {0, len(rows)}, "some rows have no mismatched answer or no reference"
    return replace(
        _join([row.example for row in rows]),
        total_weight=float(len(rows)),
        reference_2P=torch.tensor(known).T if known else None,
        desirable_P=torch.tensor([row.desirable for row in rows]),
        mismatched=_join(mismatched) if mismatched else None,
    )


def _join(examples: Sequence[Example]) -> Batch:
    lengths = tuple(len(e) for e in examples)
    labels_T = np.concatenate([e.labels for e in examples])
    positions_S, targets_S = next_token_targets(labels_T, lengths)
    weights_S = _weights(examples, positions_S)
    return Batch(
        input_ids_T=torch.from_numpy(np.concatenate([e.input_ids for e in examples]).astype(np.int64)),
        position_ids_T=torch.cat([torch.arange(length) for length in lengths]),
        positions_S=torch.from_numpy(positions_S),
        targets_S=torch.from_numpy(targets_S),
        lengths=lengths,
        sources=tuple(e.source for e in examples),
        weights_S=None if weights_S is None else torch.from_numpy(weights_S),
        total_weight=float(len(targets_S) if weights_S is None else weights_S.sum(dtype=np.float64)),
    )


def target_rows(batch: Batch) -> torch.Tensor:
    """The row of each target, int64 ``[S]``.

    Example:
        ``lengths = (3, 2)``, targets predicted at ``[0, 1, 3]`` -> ``[0, 0, 1]``.
    """
    ends_R = torch.tensor(batch.lengths, device=batch.positions_S.device).cumsum(0)
    return torch.bucketize(batch.positions_S, ends_R, right=True)


def collate_ids(rows: Sequence[np.ndarray]) -> Batch:
    """Join rows of token ids, of which nothing is learned, into one flat batch."""
    nothing = torch.empty(0, dtype=torch.long)
    return Batch(
        input_ids_T=torch.from_numpy(np.concatenate(rows).astype(np.int64)),
        position_ids_T=torch.cat([torch.arange(len(row)) for row in rows]),
        positions_S=nothing,
        targets_S=nothing,
        lengths=tuple(len(row) for row in rows),
        sources=(),
    )


def _weights(examples: Sequence[Example], positions_S: np.ndarray) -> np.ndarray | None:
    """Factor of each target's loss, or None where all are 1."""
    if all(e.weights is None for e in examples):
        return None
    weights_T = np.concatenate([np.ones(len(e), np.float32) if e.weights is None else e.weights for e in examples])
    return weights_T[positions_S + 1]


def next_token_targets(labels_T: np.ndarray, lengths: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The one place where labels are shifted.

    Position ``t`` predicts token ``t + 1`` of the same row; the last position of a row predicts nothing, so no row
    is ever predicted from its neighbour.

    Args:
        labels_T: integers ``[T]``, aligned with the inputs; ``IGNORE_INDEX`` where unsupervised.
        lengths: tokens of each row; sums to ``T``.

    Returns:
        ``positions_S`` (where logits are needed) and ``targets_S`` (the tokens to predict there), int64.

    Example:
        ``labels = [-100, 7, 8 | -100, 9]``, ``lengths = (3, 2)`` -> positions ``[0, 1, 3]``, targets ``[7, 8, 9]``.
    """
    assert labels_T.ndim == 1, labels_T.shape
    assert sum(lengths) == len(labels_T), (tuple(lengths), labels_T.shape)
    targets_T = np.roll(labels_T, -1)
    targets_T[np.cumsum(lengths) - 1] = IGNORE_INDEX
    positions_S = np.flatnonzero(targets_T != IGNORE_INDEX)
    return positions_S, targets_T[positions_S].astype(np.int64)

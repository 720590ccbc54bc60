"""Which planned micro-batch needs most memory, and batches of given lengths that stand for others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil

import numpy as np
import torch

from tunesmith.data.collator import collate, target_rows
from tunesmith.data.loader import DataLoader, StreamLoader, lengths_of
from tunesmith.data.sniff import Target
from tunesmith.types import IGNORE_INDEX, Batch, Example, FeedbackExample, PairExample, PolicyTargets, Source

_READ = 64
"""Micro-batches that are looked at; the others have fewer tokens."""
_EPOCHS = 32
"""Passes that are planned through."""


@dataclass(frozen=True)
class Cost:
    """What a micro-batch needs, roughly: enough to rank batches.

    Attributes:
        token: bytes of a token.
        target: bytes of a supervised token.
        padded: whether rows are padded to the longest of the batch.
        shares: whether what rows begin with alike is computed once.
    """

    token: float
    target: float
    padded: bool
    shares: bool = False

    def of(self, batch: Batch) -> float:
        """Bytes of a batch."""
        tokens = len(batch.lengths) * max(batch.lengths) if self.padded else batch.num_tokens
        tokens -= batch.num_repeated if self.shares else 0
        return self.token * tokens + self.target * batch.num_targets


def heaviest(loader: DataLoader | StreamLoader, updates: int, cost: Cost, longest: int) -> Batch:
    """The micro-batch of a run that needs most.

    Batches are ordered by the most that they could need, every token supervised, and read until no other can need more than
    the most found; at most 64 are read. Of a stream, the rows to come are not known: all are taken to be as long as they can
    be.

    Args:
        loader: of the run.
        updates: of the run.
        cost: of a batch.
        longest: tokens that a row or pack of a stream can have.
    """
    if isinstance(loader, StreamLoader):
        return blank_batch((longest,) * loader.batch_size, (longest - 1) * loader.batch_size)
    planned = _planned(loader, ceil(updates / len(loader)), cost.padded)
    found: tuple[float, Batch] | None = None
    for tokens, units in planned[:_READ]:
        if found is not None and found[0] >= tokens * (cost.token + cost.target):
            break
        batch = collate([loader.examples[row] for unit in units for row in loader.units[unit]])
        if found is None or cost.of(batch) > found[0]:
            found = (cost.of(batch), batch)
    assert found is not None
    return found[1]


def _planned(loader: DataLoader, epochs: int, padded: bool) -> list[tuple[int, list[int]]]:
    """(tokens, units) of the micro-batches with most tokens, falling."""
    lengths = lengths_of(loader.examples)
    if isinstance(loader.units, list):
        sizes = np.array([lengths[np.asarray(rows)].sum() for rows in loader.units])
        longest = np.array([lengths[np.asarray(rows)].max() for rows in loader.units])
        rows = np.array([len(rows) for rows in loader.units])
    else:
        sizes, longest, rows = lengths, lengths, np.ones(len(lengths), np.int64)
    best: list[tuple[int, list[int]]] = []
    for epoch in range(min(epochs, _EPOCHS) if loader.shuffle else 1):
        order = loader.order(epoch)
        begins = np.arange(0, len(order), loader.batch_size)  # a window is a whole number of micro-batches
        if padded:
            tokens = np.maximum.reduceat(longest[order], begins) * np.add.reduceat(rows[order], begins)
        else:
            tokens = np.add.reduceat(sizes[order], begins)
        top = np.argsort(-tokens, kind="stable")[:_READ]
        ends = np.append(begins[1:], len(order))
        best += [(int(tokens[i]), order[begins[i] : ends[i]].tolist()) for i in top.tolist()]
    return sorted(best, key=lambda entry: -entry[0])


def blank_batch(lengths: Sequence[int], targets: int, kind: Target = "conversation", common: float = 0.0) -> Batch:
    """A batch of rows of these lengths, of token 0, with so many supervised tokens at their ends.

    Args:
        lengths: of the rows; of pairs, of the better answers, then of the others.
        targets: supervised tokens in all.
        kind: what they are; of pairs, two rows make one term of a loss.
        common: share of the shorter row of a pair with which both begin.
    """
    rows = []
    for length, learned in zip(lengths, _shares(lengths, targets), strict=True):
        labels = np.full(length, IGNORE_INDEX, dtype=np.int32)
        labels[length - learned :] = 0
        rows.append(Example(np.zeros(length, np.int32), labels, Source("planned", "planned", 0, 0)))
    if kind == "feedback":
        return collate([FeedbackExample(row, True, row.source, None, (0.0, 0.0)) for row in rows])
    if kind == "prompt":
        batch = collate(rows)
        numbers_S = torch.zeros(batch.num_targets)
        return replace(batch, policy=PolicyTargets(target_rows(batch), *(numbers_S for _ in range(5))))
    if kind != "pair":
        return collate(rows)
    count = len(rows) // 2
    return collate([_blank_pair(a, b, common) for a, b in zip(rows[:count], rows[count:], strict=True)])


def _blank_pair(better: Example, worse: Example, common: float) -> PairExample:
    shorter = min(len(better), len(worse))
    return PairExample(better, worse, better.source, (0.0, 0.0), min(int(common * shorter), shorter - 1))


def _shares(lengths: Sequence[int], targets: int) -> Iterator[int]:
    left = targets
    for length in lengths:
        share = min(length - 1, left)
        left -= share
        yield share

"""Which segments of a flat batch are computed together, and how they are taken out of it and put back.

Long segments are seen where they lie. Short ones of about the same length are copied on top of each other and filled up to the
longest: many small operations become a few larger ones. A segment may go on from tokens that lie elsewhere in the batch; its
keys are those and its own, copied behind each other, and segments that go on from the same tokens are stacked.

``B`` = segments of a stack times key heads ``k``, ``g`` query heads for each of them, ``L`` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch

_SHORT = 96
"""Tokens up to which segments are stacked; longer ones are as fast alone, where nothing is copied."""

_STEP = 16
"""Lengths of a stack, of which the longest is filled up to, differ by less than this."""

Span = tuple[int, int]
"""Begin and end among the tokens of a batch."""

_SCORES = 1 << 19
"""Scores that a stack of several segments has at most."""


@dataclass(frozen=True)
class Stack:
    """One segment, or several of about the same length.

    Attributes:
        segments: begin and end of each.
        length: tokens of the longest.
        groups: key heads.
        before: begin and end of the tokens that all of them go on from.
    """

    segments: tuple[Span, ...]
    length: int
    groups: int
    before: Span = (0, 0)

    @property
    def earlier(self) -> int:
        """Tokens that come before those of the segments."""
        return self.before[1] - self.before[0]

    def take(self, tensor_1hTd: torch.Tensor, blank: bool = False) -> torch.Tensor:
        """``[B, g, L, d]``: a view of one segment, a copy of several, filled up with any numbers, or zeros if ``blank``."""
        if len(self.segments) == 1:
            begin, end = self.segments[0]
            return tensor_1hTd[0, :, begin:end].unflatten(0, (self.groups, -1))
        rows = _pick(tensor_1hTd, self._tokens)
        if blank and not self._real.all():
            rows.index_fill_(0, torch.from_numpy(np.flatnonzero(~self._real)).to(rows.device), 0)
        return self._stacked(rows)

    def take_keys(self, tensor_1kTd: torch.Tensor) -> torch.Tensor:
        """``[B, 1, E + L, d]``, the ``E`` earlier tokens first."""
        if not self.earlier:
            return self.take(tensor_1kTd)
        return self._stacked(_pick(tensor_1kTd, self._key_tokens))

    def _stacked(self, rows: torch.Tensor) -> torch.Tensor:
        stacked = rows.view(len(self.segments), -1, self.groups, rows.shape[1] // self.groups, rows.shape[2])
        return stacked.permute(0, 2, 3, 1, 4).flatten(0, 1)

    def put(self, made_BgLd: torch.Tensor, whole_1hTd: torch.Tensor) -> None:
        """Write what was made of ``take``'s to the places of the segments."""
        if len(self.segments) == 1:
            self.take(whole_1hTd).copy_(made_BgLd)
            return
        tokens, rows = self._spread(made_BgLd, self._tokens, self._real)
        whole_1hTd[0].transpose(0, 1).index_copy_(0, tokens, rows.to(whole_1hTd.dtype))

    def add_keys(self, made_B1Ld: torch.Tensor, whole_1kTd: torch.Tensor) -> None:
        """Add what was made of ``take_keys``'s to the places of all its tokens."""
        if len(self.segments) == 1 and not self.earlier:
            self.take(whole_1kTd).add_(made_B1Ld)
            return
        real = np.pad(self._real, ((0, 0), (self.earlier, 0)), constant_values=True)
        tokens, rows = self._spread(made_B1Ld, self._key_tokens, real)
        whole_1kTd[0].transpose(0, 1).index_add_(0, tokens, rows.to(whole_1kTd.dtype))

    def _spread(self, made_BgLd: torch.Tensor, tokens: np.ndarray, real: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Places in the batch, and what belongs there, ``[tokens, heads, d]``; what was only filled is left out."""
        made = made_BgLd.unflatten(0, (-1, self.groups)).permute(0, 3, 1, 2, 4)
        rows = made.reshape(-1, made.shape[2] * made.shape[3], made.shape[4])
        if not real.all():
            rows = rows.index_select(0, torch.from_numpy(np.flatnonzero(real)).to(rows.device))
        return torch.from_numpy(tokens[real]).to(rows.device), rows

    @cached_property
    def _real(self) -> np.ndarray:
        """Which of ``[segments, L]`` are tokens of the segment."""
        return np.arange(self.length) < np.array([[end - begin] for begin, end in self.segments])

    @cached_property
    def _tokens(self) -> np.ndarray:
        """Position in the flat batch, ``[segments, L]``; the last of its segment where a place is only filled."""
        begin, end = np.array(self.segments).T[:, :, None]
        return np.minimum(begin + np.arange(self.length), end - 1)

    @cached_property
    def _key_tokens(self) -> np.ndarray:
        """The same, the earlier tokens before them, ``[segments, E + L]``."""
        earlier = np.broadcast_to(np.arange(*self.before), (len(self.segments), self.earlier))
        return np.concatenate([earlier, self._tokens], axis=1)


def _pick(tensor_1hTd: torch.Tensor, tokens: np.ndarray) -> torch.Tensor:
    """``[tokens, h, d]``."""
    return tensor_1hTd[0].transpose(0, 1).index_select(0, torch.from_numpy(tokens.ravel()).to(tensor_1hTd.device))


def stacks(edges: Sequence[int], heads: int, groups: int, before: Sequence[Span] = ()) -> list[Stack]:
    """The segments of a flat batch, each in one stack; the stack that takes most memory is the last one.

    Args:
        edges: boundaries of the segments, ``0, l1, l1 + l2, ..., T``.
        heads: of queries.
        groups: heads of keys.
        before: for each segment the tokens that it goes on from; empty: none for any.
    """
    found, short = [], dict[tuple[int, Span], list[Span]]()
    for (begin, end), earlier in zip(pairwise(edges), before or [(0, 0)] * (len(edges) - 1), strict=True):
        if end - begin > _SHORT:
            found.append(Stack(((begin, end),), end - begin, groups, earlier))
        elif end > begin:
            short.setdefault((-(-(end - begin) // _STEP), earlier), []).append((begin, end))
    for (steps, earlier), segments in short.items():
        length = steps * _STEP
        most = max(_SCORES // (heads * length * (length + earlier[1] - earlier[0])), 1)
        for first in range(0, len(segments), most):
            chosen = tuple(segments[first : first + most])
            found.append(Stack(chosen, max(end - begin for begin, end in chosen), groups, earlier))
    return sorted(found, key=lambda stack: len(stack.segments) * (stack.length + stack.earlier))

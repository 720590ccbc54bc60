"""Which segments of a flat batch are computed together, and how they are taken out of it and put back.

Long segments are seen where they lie. Short ones of about the same length are copied on top of each other and filled up to the
longest: many small operations become a few larger ones.

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

_SCORES = 1 << 19
"""Scores that a stack of several segments has at most."""


@dataclass(frozen=True)
class Stack:
    """One segment, or several of about the same length.

    Attributes:
        segments: begin and end of each.
        length: tokens of the longest.
        groups: key heads.
    """

    segments: tuple[tuple[int, int], ...]
    length: int
    groups: int

    def take(self, tensor_1hTd: torch.Tensor, blank: bool = False) -> torch.Tensor:
        """``[B, g, L, d]``: a view of one segment, a copy of several, filled up with any numbers, or zeros if ``blank``."""
        if len(self.segments) == 1:
            begin, end = self.segments[0]
            return tensor_1hTd[0, :, begin:end].unflatten(0, (self.groups, -1))
        device = tensor_1hTd.device
        rows = tensor_1hTd[0].transpose(0, 1).index_select(0, torch.from_numpy(self._tokens.ravel()).to(device))
        if blank and not self._real.all():
            rows.index_fill_(0, torch.from_numpy(np.flatnonzero(~self._real)).to(device), 0)
        stacked = rows.view(len(self.segments), self.length, self.groups, -1, rows.shape[2])
        return stacked.permute(0, 2, 3, 1, 4).flatten(0, 1)

    def put(self, made_BgLd: torch.Tensor, whole_1hTd: torch.Tensor) -> None:
        """Write what was made of ``take``'s to the places of the segments."""
        if len(self.segments) == 1:
            self.take(whole_1hTd).copy_(made_BgLd)
            return
        device = whole_1hTd.device
        rows = made_BgLd.unflatten(0, (-1, self.groups)).permute(0, 3, 1, 2, 4).reshape(-1, *whole_1hTd.shape[1::2])
        if not self._real.all():
            rows = rows.index_select(0, torch.from_numpy(np.flatnonzero(self._real)).to(device))
        tokens = torch.from_numpy(self._tokens[self._real]).to(device)
        whole_1hTd[0].transpose(0, 1).index_copy_(0, tokens, rows.to(whole_1hTd.dtype))

    @cached_property
    def _real(self) -> np.ndarray:
        """Which of ``[segments, L]`` are tokens of the segment."""
        return np.arange(self.length) < np.array([[end - begin] for begin, end in self.segments])

    @cached_property
    def _tokens(self) -> np.ndarray:
        """Position in the flat batch, ``[segments, L]``; the last of its segment where a place is only filled."""
        begin, end = np.array(self.segments).T[:, :, None]
        return np.minimum(begin + np.arange(self.length), end - 1)


def stacks(edges: Sequence[int], heads: int, groups: int) -> list[Stack]:
    """The segments of a flat batch, each in one stack; the stack that takes most memory is the last one.

    Args:
        edges: boundaries of the segments, ``0, l1, l1 + l2, ..., T``.
        heads: of queries.
        groups: heads of keys.
    """
    found, short = [], dict[int, list[tuple[int, int]]]()
    for begin, end in pairwise(edges):
        if end - begin > _SHORT:
            found.append(Stack(((begin, end),), end - begin, groups))
        elif end > begin:
            short.setdefault(-(-(end - begin) // _STEP), []).append((begin, end))
    for steps, segments in short.items():
        most = max(_SCORES // (heads * (steps * _STEP) ** 2), 1)
        for first in range(0, len(segments), most):
            chosen = tuple(segments[first : first + most])
            found.append(Stack(chosen, max(end - begin for begin, end in chosen), groups))
    return sorted(found, key=lambda stack: len(stack.segments) * stack.length)

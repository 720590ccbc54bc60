"""Keys and values of rows that are being generated, in one block for each layer; rows that are done take no part.

Active rows are the first ones of the block. When a row is done, the last active one takes its place, so what a step reads is
always a view. Prompts are computed end to end in a flat batch and their keys copied to their rows, as often as a prompt has
samples; after that each step appends one token to each active row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache

from tunesmith.model.attention import NotSegmentable
from tunesmith.model.attention_kernel import as_autocast

_STEP = 32
"""Tokens by which what a step looks at grows: products of a shape that was seen before need not be planned anew."""


@dataclass(frozen=True)
class Place:
    """Where a prompt of a flat batch goes.

    Attributes:
        begin, end: its tokens in the batch.
        row: its first row in the cache.
        copies: rows that begin with it, one after the other.
    """

    begin: int
    end: int
    row: int
    copies: int


class RowCache(Cache):
    """What models are given as their cache. Before a forward pass ``prompts`` or ``advance`` says what it is to do.

    Attributes:
        lengths: tokens of each active row.
        reach: tokens that a step looks at: of the longest row, and some more.

    Args:
        rows: that are active at the same time, at most; memory is taken as it is needed.
        longest: tokens of a row, at most.
    """

    def __init__(self, rows: int, longest: int) -> None:
        super().__init__(layers=[])
        self.lengths: list[int] = []
        self._rows, self._longest = rows, longest
        self._keys: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}
        self._places: Sequence[Place] | None = None
        self._at: tuple[torch.Tensor, ...] = ()
        self.reach, self._room = 0, (0, 0)

    @property
    def bytes_per_token(self) -> int:
        """Of a row, in all layers; 0 as long as nothing was computed."""
        return sum(held[0, :, 0].nbytes for held in (*self._keys.values(), *self._values.values()))

    def prompts(self, places: Sequence[Place]) -> None:
        """The next pass computes prompts, whose rows become active."""
        self._places = places
        for place in places:
            assert place.row == len(self.lengths), "active rows are the first ones"
            self.lengths += [place.end - place.begin] * place.copies
        self._grow()

    def advance(self, device: torch.device) -> None:
        """The next pass computes one more token of each active row."""
        self._places = None
        rows_B = torch.arange(len(self.lengths), device=device)
        self._at = (rows_B, torch.tensor(self.lengths, device=device))
        self.lengths = [length + 1 for length in self.lengths]
        self._grow()

    def drop(self, row: int, wipe: bool) -> None:
        """End a row; the last one takes its place.

        Args:
            row: which.
            wipe: not all numbers of it or of the last one may be finite, so none must stay where a later row will be.
        """
        last = len(self.lengths) - 1
        for held in (*self._keys.values(), *self._values.values()):
            if row != last:
                held[row, :, : self.lengths[last]] = held[last, :, : self.lengths[last]]
            if wipe:
                held[row, :, self.lengths[last] :] = 0
                held[last] = 0
        self.lengths[row] = self.lengths[last]
        self.lengths.pop()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep what a layer computed, rounded as its attention rounds it; returns what that looks at.

        Args:
            key_states: ``[1, k, T, d]`` of a flat batch: prompts, or a token of each active row.
            value_states: ``[1, k, T, e]``.
            layer_idx: number of the layer.
            *args: not looked at.
            **kwargs: not looked at.

        Returns:
            Of prompts the same, of a step ``[B, k, L, d]`` and ``[B, k, L, e]`` of all active rows.
        """
        keys, values = self._held(self._keys, layer_idx, key_states), self._held(self._values, layer_idx, value_states)
        rounded = as_autocast(key_states, value_states)
        if self._places is not None:
            for place in self._places:
                rows = slice(place.row, place.row + place.copies)
                for held, made in ((keys, rounded[0]), (values, rounded[1])):
                    held[rows, :, : place.end - place.begin] = made[0, :, place.begin : place.end]
            return key_states, value_states
        rows_B, at_B = self._at
        for held, made in ((keys, rounded[0]), (values, rounded[1])):
            held[rows_B, :, at_B] = made[0].transpose(0, 1).to(held.dtype)
        count = len(self.lengths)
        return keys[:count, :, : self.reach], values[:count, :, : self.reach]

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        """Raises NotSegmentable: rows are of different lengths, so a model that counts by its cache cannot use this one."""
        raise NotSegmentable("the model counts positions by its cache")

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Of masks; there are none."""
        return 0

    def _grow(self) -> None:
        """Room for the longest row: twice as much as before, where rows may become so long."""
        longest = max(self.lengths, default=0)
        rows, tokens = self._room
        if len(self.lengths) > rows:
            rows = min(max(len(self.lengths), 2 * rows), max(self._rows, len(self.lengths)))
        if longest > tokens:
            tokens = max(min(max(2 * tokens, 2 * _STEP), self._longest), longest)
        self._room = (rows, tokens)
        self.reach = min(-(-longest // _STEP) * _STEP, tokens)

    def _held(self, kept: dict[int, torch.Tensor], layer: int, made: torch.Tensor) -> torch.Tensor:
        """The block of a layer, as large as it has to be; zeros where nothing was written."""
        before = kept.get(layer)
        rows, tokens = self._room
        if before is not None and before.shape[0] >= rows and before.shape[2] >= tokens:
            return before
        dtype = as_autocast(made[:, :, :0])[0].dtype
        heads, width = made.shape[1], made.shape[3]
        if kept is self._keys:  # products with queries read these along tokens, those with values along width
            kept[layer] = made.new_zeros(rows, heads, width, tokens, dtype=torch.promote_types(dtype, torch.float32)).mT
        else:
            kept[layer] = made.new_zeros(rows, heads, tokens, width, dtype=dtype)
        if before is not None:
            kept[layer][: before.shape[0], :, : before.shape[2]] = before
        return kept[layer]

"""Attention of one new token for each of several rows to keys and values that a cache holds: a step of generation.

The library repeats keys for each query head that shares them and asks for a mask of every query and key. Here the query heads
of a key head are the rows of one product with its keys. These lie in the cache token beside token for each of their numbers
(``K^T``), which the product reads as it is; laid the other way round they would be turned in every step, which takes longer
than the product. They are held in float32 though their numbers have 16 bits: a product of 16-bit factors is rounded to 16
bits, and scores must not be, as they are not in training. Rows end where they end: what lies behind is masked, and no key that
comes before all windows is read.

``B`` rows, ``L`` tokens that are held of each, ``h`` query heads, ``k`` key heads, ``g`` = h / k; ``d`` and ``e`` widths of a
head's keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from tunesmith.model.attention_kernel import Variant, as_autocast


class HeldRows:
    """Rows of a cache, and what all layers share of a step: which keys each row sees, by window and chunk.

    Args:
        lengths: tokens of each row, its new one included.
        reach: tokens that are held of each, real or not.
        device: where masks are made.
    """

    def __init__(self, lengths: Sequence[int], reach: int, device: torch.device) -> None:
        self.lengths = np.array(lengths, dtype=np.int64)
        self.reach = reach
        self._device = device
        self._made: dict[tuple[int | None, int | None], tuple[int, torch.Tensor | None]] = {}

    def seen(self, window: int | None, chunk: int | None) -> tuple[int, torch.Tensor | None]:
        """The first key that any row sees, and ``[B, 1, 1, L - first]``, True where a row does not see; None: all see all."""
        if (window, chunk) not in self._made:
            self._made[window, chunk] = self._see(window, chunk)
        return self._made[window, chunk]

    def _see(self, window: int | None, chunk: int | None) -> tuple[int, torch.Tensor | None]:
        first_B = np.zeros_like(self.lengths)
        if window is not None:
            first_B = np.maximum(self.lengths - window, 0)
        if chunk is not None:
            first_B = np.maximum(first_B, (self.lengths - 1) // chunk * chunk)
        first = int(first_B.min())
        if (first_B == first).all() and (self.lengths == self.reach).all():
            return first, None
        keys_L = np.arange(first, self.reach)
        hidden_BL = (keys_L >= self.lengths[:, None]) | (keys_L < first_B[:, None])
        return first, torch.from_numpy(hidden_BL).to(self._device)[:, None, None]


def attend_held(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    held: HeldRows,
    scale: float,
    variant: Variant,
    chunk: int | None,
    sinks_h: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of the last token of each row to its row.

    Args:
        query: ``[1, h, B, d]``, a flat batch of one token of each row.
        key: ``[B, k, L, d]``, ``h`` a multiple of ``k``; finite also where a row has no token. Best in float32.
        value: ``[B, k, L, e]``, likewise.
        held: the rows.
        scale: factor of the scores.
        variant: window and bound; without dropout.
        chunk: size of the chunks that do not see each other; None: there are none.
        sinks_h: scores of sinks, or None.

    Returns:
        ``[1, B, h, e]``.
    """
    assert key.shape[0] == query.shape[2] == len(held.lengths) and key.shape[2] == held.reach, (query.shape, key.shape)
    query, value = as_autocast(query, value)
    first, hidden_B11L = held.seen(variant.window, chunk)
    rows, groups = key.shape[:2]
    k_NLd, v_NLe = (tensor[:, :, first:].flatten(0, 1) for tensor in (key, value))
    q_Ngd = query[0].transpose(0, 1).reshape(rows * groups, -1, query.shape[3])
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    with torch.autocast(query.device.type, enabled=False):  # it would round the scores
        s_NgL = torch.bmm(q_Ngd.to(exact), k_NLd.to(exact).mT).mul_(scale)
        if variant.cap is not None:
            s_NgL.div_(variant.cap).tanh_().mul_(variant.cap)
        s_BkgL = s_NgL.view(rows, groups, -1, s_NgL.shape[2])
        if hidden_B11L is not None:
            s_BkgL.masked_fill_(hidden_B11L, -math.inf)
        if sinks_h is None:
            p_NgL = torch.softmax(s_NgL, dim=-1)
        else:
            sinks_Bkg1 = sinks_h.to(exact).view(1, groups, -1, 1).expand(rows, -1, -1, 1)
            p_NgL = torch.softmax(torch.cat([s_BkgL, sinks_Bkg1], dim=-1), dim=-1)[..., :-1].flatten(0, 1)
        out_Nge = torch.bmm(p_NgL.to(value.dtype), v_NLe)
    return out_Nge.view(1, rows, query.shape[1], value.shape[3])

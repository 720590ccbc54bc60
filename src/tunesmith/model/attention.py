"""Attention over rows laid end to end: each row attends to itself only, nothing is padded, no mask is built.

Registered with transformers' ``AttentionInterface`` under ``SEGMENTS``. The boundaries arrive as the field's usual
``cu_seq_lens_q`` keyword, which models that support padding-free attention pass through their layers.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from tunesmith.model.attention_kernel import attend

SEGMENTS = "tunesmith_segments"
_HARMLESS = {
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "position_ids", "cache_position", "use_cache",
    "output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "is_causal", "logits_to_keep",
    "seq_idx", "num_items_in_batch", "past_key_values", "labels",
}  # fmt: skip
"""Keywords that do not change what is attended to. Any other one that is set is a kind of attention not computed here."""


def segment_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each segment.

    Args:
        module: the attention layer that calls.
        query: ``[1, heads, T, d]``.
        key: ``[1, kv_heads, T, d]``, as many heads as ``query`` or fewer (grouped queries).
        value: like ``key``.
        attention_mask: must be None.
        scaling: factor of the scores; ``1/sqrt(d)`` if None.
        dropout: probability on the attention weights.
        kwargs: must hold ``cu_seq_lens_q``, the row boundaries ``[0, l1, l1 + l2, ...]``.

    Returns:
        ``[1, T, heads, d]`` and no weights.

    Raises:
        NotSegmentable: a variant of attention that this function does not compute.
    """
    boundaries = kwargs.get("cu_seq_lens_q")
    unknown = [name for name, value in kwargs.items() if name not in _HARMLESS and value is not None and value is not False]
    window = kwargs.get("sliding_window")
    if window is not None and boundaries is not None and window >= int(boundaries.diff().max()):
        unknown.remove("sliding_window")
    if boundaries is None or attention_mask is not None or unknown:
        raise NotSegmentable(", ".join(unknown) or "row boundaries do not reach the attention layers")
    edges = boundaries.tolist()
    if query.device.type == "cpu" and not dropout and query.shape[-1] == value.shape[-1]:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return attend(query, key, value, edges, scale), None
    grouped = query.shape[1] != key.shape[1]
    parts = [
        F.scaled_dot_product_attention(
            query[:, :, a:b],
            key[:, :, a:b],
            value[:, :, a:b],
            dropout_p=dropout,
            is_causal=True,
            scale=scaling,
            enable_gqa=grouped,
        )
        for a, b in pairwise(edges)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


class NotSegmentable(RuntimeError):
    """The model asks for a kind of attention that must be run on padded rows."""


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


def register() -> None:
    """Make ``SEGMENTS`` known to transformers."""
    AttentionInterface.register(SEGMENTS, segment_attention)
    AttentionMaskInterface.register(SEGMENTS, _no_mask)

"""Attention over rows laid end to end: each row attends to itself only, and nothing is padded.

Registered with transformers' ``AttentionInterface`` under ``SEGMENTS``. The boundaries arrive as the field's usual
``cu_seq_lens_q`` keyword, which models that support padding-free attention pass through their layers; where rows go on from
tokens that lie elsewhere (``shared.py``), those are in ``cu_seq_lens_k``. In a step of generation each row is one token, and
its keys are those that a cache holds (``held_rows``, ``attention_cached.py``). What a layer does beside looking back over its
row arrives with its call: bounded scores, sinks, dropout. How far it looks is said by the mask that the model asks transformers
for, of which only the size is made here; some models tell their layers of a window too, others do not.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from tunesmith.model.attention_cached import HeldRows, attend_held
from tunesmith.model.attention_kernel import Variant
from tunesmith.model.attention_routes import Segments, compute
from tunesmith.model.stacks import Span

SEGMENTS = "tunesmith_segments"
_HARMLESS = {
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "position_ids", "cache_position", "use_cache",
    "output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "is_causal", "logits_to_keep",
    "seq_idx", "num_items_in_batch", "past_key_values", "cache", "labels", "held_rows",
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
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each segment.

    Args:
        module: the attention layer that calls.
        query: ``[1, heads, T, d]``.
        key: ``[1, kv_heads, T, d]``, as many heads as ``query`` or fewer (grouped queries); of a cache ``[T, kv_heads, L, d]``.
        value: ``[1, kv_heads, T, e]``; of a cache ``[T, kv_heads, L, e]``.
        attention_mask: None, or what ``_reach`` made.
        scaling: factor of the scores; ``1/sqrt(d)`` if None.
        dropout: probability on the attention weights.
        sliding_window: tokens that a query sees at most, its own included.
        softcap: bound of the scores.
        s_aux: a score of each head that takes part in the softmax and gives nothing.
        kwargs: must hold ``cu_seq_lens_q``, the row boundaries ``[0, l1, l1 + l2, ...]``; ``cu_seq_lens_k`` are the same, or
            ``[rows, 2]``, begin and end of the tokens elsewhere in the batch that come before those of each row. ``held_rows``
            says that keys and values are those of a cache, and how long its rows are.

    Returns:
        ``[1, T, heads, e]`` and no weights.

    Raises:
        NotSegmentable: a variant of attention that this function does not compute.
    """
    boundaries = kwargs.get("cu_seq_lens_q")
    unknown = [name for name, value in kwargs.items() if name not in _HARMLESS and value is not None and value is not False]
    if kwargs.get("is_causal") is False:
        unknown.append("attention to later tokens")
    if boundaries is None or unknown:
        raise NotSegmentable(", ".join(unknown) or "row boundaries do not reach the attention layers")
    window, chunk = _sizes(attention_mask)
    if sliding_window is not None and sliding_window != window:
        raise NotSegmentable(f"a layer is told to look back {sliding_window} tokens, its mask says {window or 'otherwise'}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    held: HeldRows | None = kwargs.get("held_rows")
    if held is not None:
        if dropout:
            raise NotSegmentable("dropout in a step of generation")
        return attend_held(query, key, value, held, scale, Variant(window, softcap), chunk, s_aux), None
    segments = _segments(boundaries, kwargs.get("cu_seq_lens_k"), chunk)
    if window is not None and window >= segments.longest:
        window = None
    out = compute(
        query,
        key,
        value,
        segments,
        scale,
        Variant(window, softcap, dropout),
        s_aux,
        say=module.training,
    )
    return out, None


def _segments(boundaries: torch.Tensor, keys: torch.Tensor | None, chunk: int | None) -> Segments:
    """The rows, cut into chunks that do not see each other if there are any."""
    edges: list[int] = boundaries.tolist()
    before: list[Span] = [(begin, end) for begin, end in keys.tolist()] if keys is not None and keys.ndim == 2 else []
    if chunk is None:
        return Segments(boundaries, edges, before)
    cuts, earlier = [0], []
    for (begin, end), (first, last) in zip(pairwise(edges), before or [(0, 0)] * (len(edges) - 1), strict=True):
        place = last - first  # of the row's next token
        while begin < end:
            step = min(chunk - place % chunk, end - begin)
            into = min(place % chunk, last - first)
            earlier.append((last - into, last))
            first, begin, place = last, begin + step, place + step
            cuts.append(begin)
    return Segments(boundaries, cuts, earlier if before else [])


class NotSegmentable(RuntimeError):
    """The model asks for a kind of attention that must be run on padded rows."""


def _sizes(mask: torch.Tensor | None) -> tuple[int | None, int | None]:
    """(window, chunk) of what ``_reach`` made."""
    if mask is None:
        return None, None
    if mask.ndim != 1 or mask.dtype != torch.int64:
        raise NotSegmentable("the model makes a mask of its own")
    window, chunk = mask.tolist()
    return window or None, chunk or None


def _reach(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """What takes the place of a mask: ``[window, chunk]``, 0 for none; None where all of the row is seen.

    Raises:
        NotSegmentable: a mask that is neither.
    """
    if kwargs.get("use_vmap"):
        raise NotSegmentable("the model puts a mask of its own over the causal one")
    size, config = kwargs.get("local_size"), kwargs.get("config")
    if size is None:
        return None
    windowed, chunked = (getattr(config, name, None) == size for name in ("sliding_window", "attention_chunk_size"))
    if windowed == chunked:
        raise NotSegmentable(f"a mask of {size} tokens that is not known to be a window or a chunk")
    return torch.tensor([size, 0] if windowed else [0, size])


def register() -> None:
    """Make ``SEGMENTS`` known to transformers."""
    AttentionInterface.register(SEGMENTS, segment_attention)
    AttentionMaskInterface.register(SEGMENTS, _reach)

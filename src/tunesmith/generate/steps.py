"""Forward passes of generation: prompts end to end, then one token of each row; and whether a model can be run so."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import numpy as np
import torch
from transformers import PreTrainedConfig

from tunesmith.errors import ModelError
from tunesmith.generate.cache import Place, RowCache
from tunesmith.model.adapter import unwrap
from tunesmith.model.attention import NotSegmentable
from tunesmith.model.attention_cached import HeldRows
from tunesmith.model.forward import DIFFERENCE, FlatForward, probe_batch
from tunesmith.model.output import adds_nothing
from tunesmith.model.packed import packed_linears
from tunesmith.model.precision import autocast

_DRAWS = 3
"""Batches of the trial of which a token's least difference counts (see ``model/forward.py``)."""
_KNOWN = 2
"""Tokens of a row of the trial that are its prompt."""


class Steps:
    """Runs a model on prompts and on next tokens, with the adapters that are active, as in training.

    Args:
        forward: the model on segment attention.
        dtype: of matrix products.
    """

    def __init__(self, forward: FlatForward, dtype: torch.dtype) -> None:
        self.forward, self.dtype = forward, dtype
        base = unwrap(forward.model)
        self.device = base.device
        names = inspect.signature(base.forward).parameters
        self._cache = "cache" if "cache" in names else "past_key_values"

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within this context passes may be made: no gradients, evaluation mode, the run's arithmetic, weights packed."""
        model = self.forward.model
        training = model.training
        model.eval()
        try:
            with torch.no_grad(), autocast(self.device, self.dtype), packed_linears(model, self.dtype):
                yield
        finally:
            model.train(training)

    def prompts(self, cache: RowCache, prompts: Sequence[np.ndarray], copies: Sequence[int]) -> torch.Tensor:
        """Compute prompts and give each as many rows of the cache as it has copies.

        Returns:
            Logits ``[P, V]`` after each prompt.
        """
        ends = list(accumulate(len(ids) for ids in prompts))
        row, places = len(cache.lengths), []
        for ids, end, count in zip(prompts, ends, copies, strict=True):
            places.append(Place(end - len(ids), end, row, count))
            row += count
        cache.prompts(places)
        boundaries = torch.tensor([0, *ends], dtype=torch.int32)
        inputs = {
            "input_ids": self._row(np.concatenate(prompts)),
            "position_ids": self._row(np.concatenate([np.arange(len(ids)) for ids in prompts])),
            "cu_seq_lens_q": boundaries,
            "cu_seq_lens_k": boundaries,
            "max_length_q": max(map(len, prompts)),
            "max_length_k": max(map(len, prompts)),
            "use_cache": True,
            self._cache: cache,
        }
        return self.forward.picked(inputs, torch.tensor(ends, device=self.device) - 1)

    def next(self, cache: RowCache, tokens: Sequence[int]) -> torch.Tensor:
        """Append a token to each active row.

        Returns:
            Logits ``[B, V]`` after it.
        """
        places = self._row(np.array(cache.lengths))
        cache.advance(self.device)
        boundaries = torch.arange(len(tokens) + 1, dtype=torch.int32)
        held = HeldRows(cache.lengths, cache.reach, self.device)
        inputs = {
            "input_ids": self._row(np.array(tokens)),
            "position_ids": places,
            "cu_seq_lens_q": boundaries,
            "cu_seq_lens_k": boundaries,
            "max_length_q": 1,
            "max_length_k": cache.reach,
            "use_cache": True,
            "held_rows": held,
            self._cache: cache,
        }
        return self.forward.picked(inputs, torch.arange(len(tokens), device=self.device))

    def _row(self, numbers: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(numbers.astype(np.int64)).to(self.device)[None]


def bytes_per_token(steps: Steps) -> int:
    """What a cache holds of each token of a row, found by computing one."""
    cache = RowCache(1, 1)
    with steps.running():
        steps.prompts(cache, [np.zeros(1, dtype=np.int64)], [1])
    return cache.bytes_per_token


def one_scale(config: PreTrainedConfig) -> int | None:
    """Tokens up to which a position means the same, however long the rows beside it are; None: always.

    Some rotations have other frequencies once the longest row of a batch is longer than a limit (``longrope``).
    """
    found = getattr(config, "rope_parameters", None) or {}
    limits = [
        one.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None) or 0
        for one in (found, *found.values())
        if isinstance(one, dict) and one.get("rope_type") == "longrope"
    ]
    return min(limits, default=None)


def why_not(steps: Steps) -> str:
    """Why a model cannot be run in steps, found by running it both ways on a few tokens; empty if it can."""
    forward = steps.forward
    if not forward.segments:
        return "its attention does not take rows end to end"
    if not adds_nothing(forward.model):
        return "it does more than its layers do"
    allowed = torch.tensor(DIFFERENCE[steps.dtype == torch.float32])
    try:
        with steps.running():
            least = None
            for draw in range(_DRAWS):
                differences = _differences(steps, draw)
                least = differences if least is None else torch.minimum(least, differences)
                found = torch.stack([least.mean(), least.max()])
                if (found <= allowed).all():
                    return ""
        return f"steps give other logits than training (relative difference {found[0]:.1e} in the mean, {found[1]:.1e} at most)"
    except (ModelError, NotSegmentable, ValueError, TypeError, RuntimeError, IndexError, AttributeError) as error:
        return str(error).splitlines()[0]


def _differences(steps: Steps, draw: int) -> torch.Tensor:
    """How much the logits of each token behind the prompts differ, relative to their norm; short rows end before long ones."""
    batch = probe_batch(unwrap(steps.forward.model), draw)
    expected = steps.forward.logits(batch).float().split(list(batch.lengths))
    rows = [ids.cpu().numpy() for ids in batch.input_ids_T.split(list(batch.lengths))]
    active = list(range(len(rows)))
    cache = RowCache(len(rows), max(batch.lengths))
    logits = steps.prompts(cache, [ids[:_KNOWN] for ids in rows], [1] * len(rows))
    found = []
    while True:
        known = cache.lengths
        for row, length, made in zip(active, known, logits.float(), strict=True):
            theirs = expected[row][length - 1]
            found.append((row, length, (made - theirs).norm() / theirs.norm()))
        for place in reversed(range(len(active))):
            if cache.lengths[place] == len(rows[active[place]]):
                cache.drop(place, wipe=False)
                active[place] = active[-1]
                active.pop()
        if not active:
            return torch.stack([difference for *_, difference in sorted(found, key=lambda one: one[:2])]).cpu()
        logits = steps.next(cache, [int(rows[row][length]) for row, length in zip(active, cache.lengths, strict=True)])

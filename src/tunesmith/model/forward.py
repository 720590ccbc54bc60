"""Flat batch in, logits or hidden states at chosen positions out, whatever the model can take.

Where a model's attention accepts row boundaries, rows are computed end to end; otherwise they are padded inside
this module, with a message. The choice is not guessed from names: a probe runs both ways and compares.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from tunesmith.errors import ModelError
from tunesmith.model.adapter import unwrap
from tunesmith.model.attention import SEGMENTS, NotSegmentable, register
from tunesmith.model.noise import EmbeddingNoise
from tunesmith.model.shared import layout
from tunesmith.types import Batch

_PROBE_LENGTHS = (5, 3, 6)
DIFFERENCE = {True: (1e-4, 1e-4), False: (5e-2, 0.25)}
"""Float32 or not -> how much a token's logits may differ between the two ways, in the mean and at most, relative to their norm.
In 16 bits one token's may be all rounding (SmolLM2, eight draws: up to 0.4 between the library's own two attentions); their
mean is not."""
_DRAWS = 3
"""Batches of which one token's least difference counts: rounding sends a token to other experts by chance, an error stays."""


class FlatForward:
    """Runs a model on flat batches.

    Args:
        model: what is called; plain or adapted.
        segments: True to compute rows end to end, False to pad them.
        noise_alpha: strength of NEFTune's noise in training; None for none.
        share: whether what rows of a batch begin with alike is computed once; of no effect where rows are padded.
    """

    def __init__(self, model: Any, segments: bool, noise_alpha: float | None = None, share: bool = False) -> None:
        self.model = model
        self.segments = segments
        self.share = share
        self._noise = EmbeddingNoise(unwrap(model).get_input_embeddings(), noise_alpha) if noise_alpha is not None else None
        self._keeps_logits = "logits_to_keep" in inspect.signature(unwrap(model).forward).parameters

    def logits(self, batch: Batch) -> torch.Tensor:
        """Logits ``[S, V]`` where the batch has targets; the output head runs there only, if the model allows it."""
        return self._flat(batch) if self.segments else self._padded(batch)

    def hidden(self, batch: Batch, positions_P: torch.Tensor) -> torch.Tensor:
        """Hidden states ``[P, H]`` at positions of the flat batch, as the output head would be given; it is not run.

        Whatever adapters are active take part.

        Raises:
            ModelError: the library does not tell the decoder of this model.
        """
        decoder = unwrap(self.model).get_decoder()
        if self.segments:
            inputs, at_P = self._flat_inputs(batch, positions_P)
            return _states(decoder(**inputs))[0, at_P]
        inputs, real_BL = self._padded_inputs(batch)
        return _states(decoder(**inputs))[real_BL][positions_P]

    def _flat(self, batch: Batch) -> torch.Tensor:
        return self.picked(*self._flat_inputs(batch, batch.positions_S))

    def picked(self, inputs: Mapping[str, Any], at_P: torch.Tensor) -> torch.Tensor:
        """Logits ``[P, V]`` at places of the one row that ``inputs`` are; the output head runs there only, if it can.

        Args:
            inputs: keyword arguments of the model.
            at_P: int64.
        """
        logits: torch.Tensor = (
            self.model(**inputs, logits_to_keep=at_P).logits[0] if self._keeps_logits else self.model(**inputs).logits[0, at_P]
        )
        return logits

    def _padded(self, batch: Batch) -> torch.Tensor:
        inputs, real_BL = self._padded_inputs(batch)
        return self.model(**inputs).logits[real_BL][batch.positions_S]

    def _flat_inputs(self, batch: Batch, positions_P: torch.Tensor) -> tuple[dict[str, Any], torch.Tensor]:
        """Keyword arguments, and where the positions are among the tokens that are computed."""
        shared = layout(batch) if self.share else None
        ids_T, places_T, lengths = batch.input_ids_T, batch.position_ids_T, batch.lengths
        if shared is not None:
            ids_T, places_T, lengths = ids_T[shared.tokens_T], places_T[shared.tokens_T], shared.lengths
            positions_P = shared.places_V[positions_P]
        # the boundaries stay on the host: the attention function needs them as numbers
        boundaries = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        if self._noise:
            self._noise.lengths = torch.tensor(batch.lengths).repeat_interleave(torch.tensor(lengths))[None]
        inputs = {
            "input_ids": ids_T[None],
            "position_ids": places_T[None],
            "cu_seq_lens_q": boundaries,
            "cu_seq_lens_k": boundaries if shared is None else shared.before_B2,
            "max_length_q": max(lengths),
            "max_length_k": max(batch.lengths),
            "use_cache": False,
        }
        return inputs, positions_P

    def _padded_inputs(self, batch: Batch) -> tuple[dict[str, Any], torch.Tensor]:
        """Keyword arguments, and which entries of the padded batch are real, ``[B, L]``."""
        rows, longest = len(batch.lengths), max(batch.lengths)
        lengths = torch.tensor(batch.lengths, device=batch.input_ids_T.device)
        if self._noise:
            self._noise.lengths = lengths[:, None]
        real_BL = torch.arange(longest, device=lengths.device)[None] < lengths[:, None]
        input_ids_BL = torch.zeros(rows, longest, dtype=torch.long, device=lengths.device)
        position_ids_BL = torch.zeros_like(input_ids_BL)
        input_ids_BL[real_BL] = batch.input_ids_T
        position_ids_BL[real_BL] = batch.position_ids_T
        inputs = {
            "input_ids": input_ids_BL,
            "attention_mask": real_BL.long(),
            "position_ids": position_ids_BL,
            "use_cache": False,
        }
        return inputs, real_BL


def _states(output: Any) -> torch.Tensor:
    """What a decoder ends with. Raises ModelError when it is no decoder."""
    states = getattr(output, "last_hidden_state", None)
    if not isinstance(states, torch.Tensor):
        raise ModelError(
            f"no hidden states from this model ({type(output).__name__}): the library does not tell its decoder from its head, "
            "so a value head has nothing to read; use another model"
        )
    return states


def probe_batch(model: PreTrainedModel, seed: int = 0) -> Batch:
    """A few short rows of drawn tokens, all positions wanted, on the model's device."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    total = sum(_PROBE_LENGTHS)
    ids = torch.randint(0, vocabulary, (total,), generator=torch.Generator().manual_seed(seed))
    positions = torch.cat([torch.arange(length) for length in _PROBE_LENGTHS])
    return Batch(ids, positions, torch.arange(total), ids, _PROBE_LENGTHS, ()).to(model.device)


@torch.no_grad()
def segments_work(model: PreTrainedModel) -> tuple[bool, str]:
    """Whether end-to-end rows give what padded rows give, and if not, why.

    Leaves the model on segment attention when they do, and as it was otherwise.

    Args:
        model: loaded, on its device.
    """
    if reason := other_layers(model.config.get_text_config()):
        return False, reason
    register()
    before, training = model.config._attn_implementation, model.training
    allowed = torch.tensor(DIFFERENCE[model.dtype == torch.float32])
    model.eval()
    try:
        least = torch.full((sum(_PROBE_LENGTHS),), torch.inf)
        for draw in range(_DRAWS):
            if draw:
                model.set_attn_implementation(before)
            least = torch.minimum(least, _differences(model, probe_batch(model, draw)))
            found = torch.stack([least.mean(), least.max()])
            if (found <= allowed).all():
                return True, ""
        reason = f"rows end to end give other logits (relative difference {found[0]:.1e} in the mean, {found[1]:.1e} at most)"
    except (NotSegmentable, ValueError, TypeError, RuntimeError, IndexError) as error:
        reason = str(error).splitlines()[0]
    finally:
        model.train(training)
    model.set_attn_implementation(before)
    return False, reason


def _differences(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """How much the logits of each token differ, relative to their norm; leaves the model on segment attention."""
    padded = FlatForward(model, segments=False).logits(batch).float()
    model.set_attn_implementation(SEGMENTS)
    flat = FlatForward(model, segments=True).logits(batch).float()
    return ((flat - padded).norm(dim=-1) / padded.norm(dim=-1)).cpu()


@torch.no_grad()
def sharing_works(model: PreTrainedModel) -> bool:
    """Whether rows that begin alike give what they give one by one.

    Args:
        model: on segment attention.
    """
    training, allowed = model.training, torch.tensor(DIFFERENCE[model.dtype == torch.float32])
    model.eval()
    try:
        for draw in range(_DRAWS):
            batch = probe_batch(model, draw)
            ids_T = batch.input_ids_T.clone()
            ids_T[8:11] = ids_T[:3]
            batch = replace(batch, input_ids_T=ids_T, begins_like=((0, 0), (0, 0), (0, 3)))
            alone, together = (FlatForward(model, True, share=share).logits(batch).float() for share in (False, True))
            differences = ((together - alone).norm(dim=-1) / alone.norm(dim=-1)).cpu()
            if (torch.stack([differences.mean(), differences.max()]) <= allowed).all():
                return True
        return False
    except (NotSegmentable, ValueError, TypeError, RuntimeError, IndexError):
        return False
    finally:
        model.train(training)


def other_layers(config: PreTrainedConfig) -> str:
    """Why layers of the model are not attention to earlier tokens of the row, or nothing."""
    kinds = set(config.to_dict().get("layer_types") or ()) - {"full_attention", "sliding_attention", "chunked_attention"}
    return f"layers of another kind: {', '.join(sorted(kinds))}" if kinds else ""

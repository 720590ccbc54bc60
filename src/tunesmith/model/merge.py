"""An adapter merged into its base, in float32; the base and the adapter stay as they are on disk."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from tunesmith.config.arguments import ModelArguments
from tunesmith.errors import ModelError
from tunesmith.model.adapter import load_finished, load_trainable_params
from tunesmith.model.files import ADAPTER_WEIGHTS
from tunesmith.model.into_base import is_tied, merge_into_base
from tunesmith.model.load import load_base_model
from tunesmith.model.settings import read_settings
from tunesmith.model.source import locate

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Merged:
    """A model with everything in its own weights.

    Attributes:
        model: in float32 on the CPU.
        untied: whether its head no longer is its embedding, as it was in the base.
    """

    model: PreTrainedModel
    untied: bool


def base_config(args: ModelArguments) -> PreTrainedConfig:
    """The configuration of a base that an adapter can be merged into.

    Raises:
        ModelError: it cannot be read, or the base is quantised on disk.
    """
    source = locate(args)
    path = source.path
    config = read_settings(path, source.trusted)
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None:
        method = quantised.get("quant_method", "") if isinstance(quantised, dict) else getattr(quantised, "quant_method", "")
        raise ModelError(
            f"{path}: its weights are quantised ({getattr(method, 'value', method) or 'unknown method'}). Merged into them, "
            "the adapter would be rounded to as few bits. Name the full-precision model with --base, or use --adapter-only"
        )
    return config


def merge_adapter(
    args: ModelArguments, adapter: Path, tokenizer: PreTrainedTokenizerBase, weights: Sequence[Path] = ()
) -> Merged:
    """Load a base and merge an adapter into it, all in float32.

    Args:
        args: the base; must not ask for quantisation.
        adapter: folder in PEFT's layout.
        tokenizer: each of its tokens gets a row in the base.
        weights: folders of earlier trained weights, put into the base first.

    Raises:
        ModelError: base, weights and adapter do not fit, the method cannot be merged, or a merged weight is not finite.
    """
    base_config(args)
    base = load_base_model(args, torch.float32, _CPU, tokenizer)
    for folder in weights:
        load_trainable_params(base, folder)
    was_tied = is_tied(base)
    grow_for(base, adapter)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model has .tie_word_embeddings")  # what it warns of is seen to below
        tuned = load_finished(base, adapter)
    assert isinstance(tuned, PeftModel)
    model = merge_into_base(tuned, adapter, "use --adapter-only")
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise ModelError(f"{adapter}: {name} is not finite after merging; the run diverged, or the files do not fit")
    return Merged(model, untied=was_tied and not is_tied(model))


def grow_for(model: PreTrainedModel, adapter: Path) -> None:
    """Give the embedding as many rows as the adapter brings, if it brings one. Raises ModelError when it cannot be read."""
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    path = adapter / ADAPTER_WEIGHTS
    try:
        with safe_open(path, "pt") as file:
            rows = [file.get_slice(key).get_shape()[0] for key in file.keys() if key.endswith(f".{name}.weight")]  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from None
    if rows and rows[0] != embedding.num_embeddings:
        model.resize_token_embeddings(rows[0], mean_resizing=False)

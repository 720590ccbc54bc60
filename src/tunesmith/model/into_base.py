"""Adapters merged into the weights under them, also where the output head is the embedding."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from tunesmith.errors import ModelError


def merge_into_base(tuned: PeftModel, adapter: Path, instead: str) -> PreTrainedModel:
    """The model with its adapter merged into its own weights, which are changed in place.

    A head that is the embedding gets its own copy first if either is adapted: PEFT would change both by what belongs to one.
    It is tied again if the two are still equal; else the configuration says that they are two.

    Args:
        tuned: the model with the adapter.
        adapter: its folder, for messages.
        instead: what to do where it cannot be merged.

    Raises:
        ModelError: the method cannot be merged.
    """
    if not hasattr(tuned.base_model, "merge_and_unload"):
        kind = getattr(tuned.active_peft_config.peft_type, "value", tuned.active_peft_config.peft_type)
        raise ModelError(f"{adapter}: an adapter of the kind {kind} cannot be merged; {instead}")
    base = tuned.get_base_model()
    assert isinstance(base, PreTrainedModel)
    parted = is_tied(base) and _is_end_adapted(base)
    if parted:
        head = _ends(base)[1]
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Model with .tie_word_embeddings")
            warnings.filterwarnings("ignore", "Input and output embeddings are no longer tied")
            model = tuned.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError, AttributeError) as error:
        raise ModelError(f"{adapter}: cannot be merged: {str(error).splitlines()[0]}; {instead}") from error
    assert isinstance(model, PreTrainedModel)
    if parted:
        _tie_again(model)
    return model


def _tie_again(model: PreTrainedModel) -> None:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    same = embedding.weight.shape == head.weight.shape and torch.equal(embedding.weight, head.weight)
    if same:
        head.weight = embedding.weight
    model.config.tie_word_embeddings = same


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the output head is the embedding, below whatever wraps them."""
    embedding, head = _ends(model)
    return head is not None and embedding.weight is head.weight


def _is_end_adapted(model: PreTrainedModel) -> bool:
    outer = (model.get_input_embeddings(), model.get_output_embeddings())
    return any(wrapper is not module for wrapper, module in zip(outer, _ends(model), strict=True))


def _ends(model: PreTrainedModel) -> list[Any]:
    """Embedding and head below whatever wraps them."""
    found = []
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        while (inner := getattr(module, "base_layer", None) or getattr(module, "original_module", None)) is not None:
            module = inner
        found.append(module)
    return found

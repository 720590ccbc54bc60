"""Loads models. Safetensors only; no code from a model runs unless the user says so."""

from __future__ import annotations

import logging
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tunesmith.config.arguments import ModelArguments
from tunesmith.errors import ModelError
from tunesmith.model.adapter import load_finished
from tunesmith.model.files import CONFIG
from tunesmith.model.forward import segments_work, sharing_works
from tunesmith.model.into_base import merge_into_base
from tunesmith.model.library import quiet_library
from tunesmith.model.precision import norms_to_float, pick_device, resolve_dtype
from tunesmith.model.quantize import check_foreign, is_quantised, keep_differentiable, missing_library, quantisation
from tunesmith.model.settings import library_error, read_settings
from tunesmith.model.source import Source, locate
from tunesmith.model.tokenizer import load_tokenizer, read_tokenizer
from tunesmith.model.vocabulary import align_special_tokens, fit_vocabulary

log = logging.getLogger(__name__)


def load_pretrained(
    args: ModelArguments, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of ``model_name_or_path``, made to fit each other.

    A model folder, a hub id, a GGUF file, ``builtin:...``, or the result of a run; an adapter is merged into its base.

    Args:
        args: which, and how.
        dtype: of the weights; what ``compute_dtype`` means on the device if None.
        device: where to; the accelerator if there is one, if None.

    Raises:
        ModelError: it is not there, cannot be loaded, or must not be (pickles, code that was not allowed, damaged files).
    """
    quiet_library()
    device = device or pick_device()
    tokenizer = load_tokenizer(args)
    return load_base_model(args, dtype or resolve_dtype(args.compute_dtype, device), device, tokenizer), tokenizer


def load_base_model(
    args: ModelArguments, dtype: torch.dtype, device: torch.device, tokenizer: PreTrainedTokenizerBase | None = None
) -> PreTrainedModel:
    """The model of ``model_name_or_path`` on ``device`` in ``dtype``, in evaluation mode, on the attention asked for.

    Every token of ``tokenizer`` has a row in it, and its configurations end and pad as the tokenizer does; if that is None,
    the model is left as it is stored.

    Raises:
        ModelError: missing, damaged, pickled or unknown weights, code that was not allowed to run, or a tokenizer that does
            not belong to the model.
    """
    source = locate(args)
    if source.adapter and args.quantization_bit:
        raise ModelError(
            f"quantization_bit: {source.adapter} would have to be merged into weights of few bits, which rounds it; name its "
            f"base {source.path} as model_name_or_path, and the adapter as checkpoint_dir"
        )
    model = _from_folder(source, args, torch.float32 if source.adapter else dtype, device)
    if source.adapter:
        log.info("%s is merged into its base, %s", source.adapter, source.path)
        own = read_tokenizer(source.tokenizer)
        fit_vocabulary(model, own, _known(own, source, model, args), resize=True)
        tuned = load_finished(model, source.adapter)
        assert isinstance(tuned, PeftModel)
        merged = merge_into_base(tuned, source.adapter, f"name its base {source.path}")
        model = merged.to(dtype)
    if tokenizer is not None:
        fit_vocabulary(model, tokenizer, _known(tokenizer, source, model, args), args.resize_vocab)
        align_special_tokens(model, tokenizer)
    quantised = is_quantised(model)
    keep_differentiable(model)
    _fit_experts(model)
    if args.upcast_layernorm or (args.upcast_layernorm is None and quantised):
        norms_to_float(model, args.layer_norm_names)
    if quantised:
        _leave_files(model)
    return (model if quantised else model.to(device)).eval()


def load_classifier(args: ModelArguments, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The sequence classifier of ``model_name_or_path``, as it is stored. Raises ModelError as ``load_base_model`` does."""
    return _from_folder(locate(args), args, dtype, device, AutoModelForSequenceClassification).to(device).eval()


def _leave_files(model: PreTrainedModel) -> None:
    """Copy what was left as it was stored out of the mapped files, so that these can be given back to the system."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def _fit_experts(model: PreTrainedModel) -> None:
    """Compute experts one by one where torch's grouped product, transformers' choice, lacks rows of whole 16 bytes."""
    stacks = [parameter for parameter in model.parameters() if parameter.dim() == 3]
    if any(size * stack.element_size() % 16 for stack in stacks for size in stack.shape[1:]):
        model.set_experts_implementation("eager")


def _known(tokenizer: PreTrainedTokenizerBase, source: Source, model: PreTrainedModel, args: ModelArguments) -> int:
    """How many tokens the model was trained with; its own tokenizer is asked where that may not be all of ``tokenizer``."""
    if len(tokenizer) == model.get_input_embeddings().num_embeddings and not (args.add_tokens or args.add_special_tokens):
        return len(tokenizer)
    return len(read_tokenizer(source.path, source.trusted))


def _from_folder(
    source: Source, args: ModelArguments, dtype: torch.dtype, device: torch.device, loader: Any = AutoModelForCausalLM
) -> PreTrainedModel:
    path = source.path
    config = read_settings(path, source.trusted)
    try:
        check_foreign(config, args, path)
        text = config.get_text_config()
        pad = getattr(text, "pad_token_id", None)
        if pad is not None and not 0 <= pad < text.vocab_size:  # -1 in old files; no row of the embedding
            text.pad_token_id = None
        model, info = loader.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            attn_implementation=None if args.attn_implementation == "auto" else args.attn_implementation,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            trust_remote_code=source.trusted,
            **quantisation(args, dtype, device),
        )
    except ImportError as error:
        raise missing_library(config, path, error) from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise library_error("model", path, error) from error
    except Exception as error:
        if type(error).__module__.startswith("safetensors"):
            raise ModelError(f"cannot load the model of {path}: a safetensors file is damaged: {error}") from error
        raise
    if wrong := sorted(info["mismatched_keys"]):
        name, stored, expected = wrong[0]
        raise ModelError(
            f"{path}: {name} is stored with the shape {tuple(stored)}, and {CONFIG} makes it {tuple(expected)} ({len(wrong)} "
            "such tensors); weights and configuration are not of one model, fetch or copy them again"
        )
    if info["missing_keys"]:
        names = ", ".join(sorted(info["missing_keys"])[:5])
        raise ModelError(f"{path}: the weights lack {len(info['missing_keys'])} tensors of the architecture: {names}")
    if info["unexpected_keys"]:
        names = ", ".join(sorted(info["unexpected_keys"])[:3])
        log.warning("%s: %d tensors have no place in the model and are left out: %s", path, len(info["unexpected_keys"]), names)
    return model


def prepare_flat(model: PreTrainedModel, args: ModelArguments) -> bool:
    """Switch the model to unpadded rows if it can; returns whether it did, and logs why not."""
    if args.attn_implementation != "auto":
        return False
    works, reason = segments_work(model)
    if not works:
        log.warning("rows are padded for this model: %s", reason)
    return works


def prepare_sharing(model: PreTrainedModel, segments: bool) -> bool:
    """Whether rows that begin alike can share what they begin with; logs why not.

    Args:
        model: as ``prepare_flat`` left it.
        segments: what that returned.
    """
    if segments and not sharing_works(model):
        log.warning("common beginnings of rows are computed once for each: shared they give other logits with this model")
        return False
    return segments

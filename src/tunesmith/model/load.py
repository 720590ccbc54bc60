"""Loads models. Safetensors only; no code from a model runs unless the user says so."""

from __future__ import annotations

import logging

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from tunesmith.config.arguments import ModelArguments
from tunesmith.errors import ModelError
from tunesmith.model import attention
from tunesmith.model.forward import segments_work
from tunesmith.model.quantize import is_quantised, quantisation
from tunesmith.model.tokenizer import hub_options, library_error, model_path

log = logging.getLogger(__name__)


def load_base_model(args: ModelArguments, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The base model on ``device`` in ``dtype``, in evaluation mode, on the attention that the arguments ask for.

    Raises:
        ModelError: missing, damaged, pickled or unknown weights, or code that was not allowed to run.
    """
    attention.register()
    path = model_path(args)
    options = hub_options(args, path)
    try:
        config = AutoConfig.from_pretrained(path, **options)
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            attn_implementation=None if args.attn_implementation == "auto" else args.attn_implementation,
            output_loading_info=True,
            **quantisation(args, dtype, device),
            **options,
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise library_error("model", path, error) from error
    except Exception as error:
        if type(error).__module__.startswith("safetensors"):
            raise ModelError(f"cannot load the model of {path}: a safetensors file is damaged: {error}") from error
        raise
    if info["missing_keys"]:
        names = ", ".join(sorted(info["missing_keys"])[:5])
        raise ModelError(f"{path}: the weights lack {len(info['missing_keys'])} tensors of the architecture: {names}")
    return (model if is_quantised(model) else model.to(device)).eval()


def prepare_flat(model: PreTrainedModel, args: ModelArguments, longest: int) -> bool:
    """Switch the model to unpadded rows of up to ``longest`` tokens if it can; returns whether it did, and logs why not."""
    if args.attn_implementation != "auto":
        return False
    works, reason = segments_work(model, longest)
    if not works:
        log.warning("rows are padded for this model: %s", reason)
    return works


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ModelError when the tokenizer has ids that the model's embedding does not."""
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens, the model's embedding {rows} rows; they do not belong together"
        )

"""Loads tokenizers and models. Safetensors only; no code from a model runs unless the user says so."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tunesmith.config.arguments import ModelArguments
from tunesmith.errors import ModelError
from tunesmith.model import attention, builtin
from tunesmith.model.forward import segments_work

log = logging.getLogger(__name__)


def model_path(args: ModelArguments) -> str:
    """Folder or hub id of the base model; a built-in one is fetched if need be. Raises ModelError."""
    path = builtin.resolve(args.model_name_or_path)
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(f"model_name_or_path: {path} has no config.json, so it is not a model folder")
    if not folder.is_dir() and (path.startswith((".", "/", "~")) or path.count("/") != 1):
        raise ModelError(f"model_name_or_path: no such folder: {path}")
    return path


def _hub_options(args: ModelArguments, path: str) -> dict[str, Any]:
    options: dict[str, Any] = {"trust_remote_code": args.trust_remote_code}
    if not Path(path).is_dir():
        options.update(revision=args.model_revision, cache_dir=args.cache_dir, token=args.use_auth_token or None)
    return options


def _library_error(what: str, path: str, error: Exception) -> ModelError:
    reason = str(error).strip().splitlines()
    return ModelError(f"cannot load the {what} of {path}: {reason[0] if reason else type(error).__name__}")


def load_tokenizer(args: ModelArguments) -> PreTrainedTokenizerBase:
    """The tokenizer, with a pad token. Raises ModelError when it cannot be loaded."""
    path = model_path(args)
    return read_tokenizer(path, **_hub_options(args, path))


def read_tokenizer(path: str, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer that lies in a folder, a run's among them. Raises ModelError when it cannot be loaded."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise _library_error("tokenizer", path, error) from error
    repair_pad_token(tokenizer)
    return tokenizer


def repair_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer a pad token that is not its end-of-sequence token, if an existing special token will do.

    Nothing here depends on it (pads are told by position), but the saved tokenizer is used elsewhere, where labels
    equal to the pad id are often masked and a model trained so never learns to stop.
    """
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    taken = {tokenizer.eos_token, tokenizer.bos_token}
    special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special and t.content not in taken]
    named = [t for t in special if "pad" in t.lower()] + [t for t in special if "endoftext" in t]
    candidates = named + ([tokenizer.unk_token] if tokenizer.unk_token in special else [])
    if candidates:
        tokenizer.pad_token = candidates[0]
    elif tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token


def load_base_model(args: ModelArguments, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The base model on ``device`` in ``dtype``, in evaluation mode, on the attention that the arguments ask for.

    Raises:
        ModelError: missing, damaged, pickled or unknown weights, or code that was not allowed to run.
    """
    attention.register()
    path = model_path(args)
    options = _hub_options(args, path)
    try:
        config = AutoConfig.from_pretrained(path, **options)
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            attn_implementation=None if args.attn_implementation == "auto" else args.attn_implementation,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise _library_error("model", path, error) from error
    except Exception as error:
        if type(error).__module__.startswith("safetensors"):
            raise ModelError(f"cannot load the model of {path}: a safetensors file is damaged: {error}") from error
        raise
    if info["missing_keys"]:
        names = ", ".join(sorted(info["missing_keys"])[:5])
        raise ModelError(f"{path}: the weights lack {len(info['missing_keys'])} tensors of the architecture: {names}")
    return model.to(device).eval()


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

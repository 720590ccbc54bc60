"""Finds models and loads tokenizers, without the libraries that models need: what looks at data starts in half the time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tunesmith.config.arguments import ModelArguments
from tunesmith.errors import ModelError
from tunesmith.model import builtin


def model_path(args: ModelArguments) -> str:
    """Folder or hub id of the base model; a built-in one is fetched if need be. Raises ModelError."""
    path = builtin.resolve(args.model_name_or_path)
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(f"model_name_or_path: {path} has no config.json, so it is not a model folder")
    if not folder.is_dir() and (path.startswith((".", "/", "~")) or path.count("/") != 1):
        raise ModelError(f"model_name_or_path: no such folder: {path}")
    return path


def hub_options(args: ModelArguments, path: str) -> dict[str, Any]:
    """Arguments of ``from_pretrained``: those of the hub only where ``path`` is no folder."""
    options: dict[str, Any] = {"trust_remote_code": args.trust_remote_code}
    if not Path(path).is_dir():
        options.update(revision=args.model_revision, cache_dir=args.cache_dir, token=args.use_auth_token or None)
    return options


def library_error(what: str, path: str, error: Exception) -> ModelError:
    """What went wrong when the library loaded something, in a line."""
    reason = str(error).strip().splitlines()
    return ModelError(f"cannot load the {what} of {path}: {reason[0] if reason else type(error).__name__}")


def load_tokenizer(args: ModelArguments) -> PreTrainedTokenizerBase:
    """The tokenizer, with a pad token. Raises ModelError when it cannot be loaded."""
    path = model_path(args)
    return read_tokenizer(path, **hub_options(args, path))


def read_tokenizer(path: str, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer that lies in a folder, a run's among them. Raises ModelError when it cannot be loaded."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise library_error("tokenizer", path, error) from error
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

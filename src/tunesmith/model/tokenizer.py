"""Loads tokenizers and repairs them, without the libraries that models need: what looks at data starts in half the time."""

from __future__ import annotations

import logging
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tunesmith.config.arguments import ModelArguments
from tunesmith.errors import ConfigError, ModelError
from tunesmith.model.files import CONFIG, read_json, vocabulary_size
from tunesmith.model.settings import library_error
from tunesmith.model.source import Source, locate

log = logging.getLogger(__name__)

_GENERIC = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""Classes, by the library's newer and older name, that add nothing to ``tokenizer.json``."""

_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>")
"""End-of-sequence tokens of model families, those that end a turn first."""


def load_tokenizer(args: ModelArguments) -> PreTrainedTokenizerBase:
    """The tokenizer of ``model_name_or_path``, repaired, with the tokens that the arguments add.

    Weights of a hub are not fetched for it; those of a folder are looked at.

    Raises:
        ModelError: it cannot be loaded, or does not fit the model's vocabulary.
    """
    source = locate(args, weights=False)
    tokenizer = read_tokenizer(source.tokenizer, source.trusted)
    if not args.resize_vocab:
        _check_vocabulary(tokenizer, source)
    _add_tokens(tokenizer, args)
    return tokenizer


def read_tokenizer(folder: str | Path, trusted: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer that lies in a folder, a run's among them. Raises ModelError when it cannot be loaded."""
    try:
        loader = PreTrainedTokenizerFast if _is_generic(Path(folder)) else AutoTokenizer
        tokenizer = loader.from_pretrained(folder, trust_remote_code=trusted)
    except Exception as error:  # a damaged tokenizer.json raises bare exceptions of the Rust library
        raise library_error("tokenizer", folder, error) from error
    repair_end_token(tokenizer, Path(folder))
    repair_pad_token(tokenizer)
    return tokenizer


def _is_generic(folder: Path) -> bool:
    """Whether ``tokenizer.json`` is all of the tokenizer, as its configuration says.

    The library would take the class of the model's kind all the same, and put that kind's way of splitting text in the place
    of the file's: other tokens, without a word.
    """
    if not ((folder / "tokenizer.json").is_file() and (folder / "tokenizer_config.json").is_file()):
        return False
    config = read_json(folder / "tokenizer_config.json")
    return config.get("tokenizer_class") in _GENERIC and not config.get("auto_map")


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, source: Source) -> None:
    size = vocabulary_size(read_json(source.path / CONFIG))
    if size is not None and len(tokenizer) > size and source.tokenizer == source.path:
        raise ModelError(
            f"{source.path}: the tokenizer has {len(tokenizer)} tokens, vocab_size in {CONFIG} is {size}; they do not belong "
            "together. Where tokens were added to the tokenizer on purpose, resize_vocab: true gives them rows"
        )


# ---- added tokens


def _add_tokens(tokenizer: PreTrainedTokenizerBase, args: ModelArguments) -> None:
    known = tokenizer.get_vocab()
    if there := [token for token in (*args.add_tokens, *args.add_special_tokens) if token in known]:
        log.warning("already tokens of this model, and trained on as they are: %s", ", ".join(there))
    tokenizer.add_tokens(list(args.add_tokens))
    tokenizer.add_tokens(list(args.add_special_tokens), special_tokens=True)


def added_token_ids(args: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the tokens that the arguments add, sorted; rows of the embedding that must be learned."""
    return sorted({tokenizer.convert_tokens_to_ids(token) for token in (*args.add_tokens, *args.add_special_tokens)})


def check_added_tokens(tokenizer: PreTrainedTokenizerBase, ids: list[int], folder: Path) -> None:
    """Refuse rows that an adapter learned for other tokens.

    Args:
        tokenizer: of the run.
        ids: of the tokens that it adds.
        folder: of an adapter that is gone on from.

    Raises:
        ConfigError: a token of the same number has another name there.
    """
    if not ids or not (folder / "tokenizer_config.json").is_file():
        return
    theirs = read_tokenizer(folder)
    for number in ids:
        here = tokenizer.convert_ids_to_tokens(number)
        there = theirs.convert_ids_to_tokens(number) if number < len(theirs) else None
        if here != there:
            raise ConfigError(
                f"add_tokens: {here!r} would take the row that the adapter in {folder} learned for {there!r}; give add_tokens "
                "and add_special_tokens as its run had them"
            )


# ---- repairs


def repair_end_token(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """If the tokenizer has no end-of-sequence token, give it the one that the model's files name, or that families use."""
    if tokenizer.eos_token is not None:
        return
    for name in ("generation_config.json", CONFIG):
        if not (folder / name).is_file():
            continue
        ids = read_json(folder / name).get("eos_token_id")
        number = ids[0] if isinstance(ids, list) and ids else ids
        if type(number) is int and 0 <= number < len(tokenizer):
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(number)
            log.warning("the tokenizer names no end-of-sequence token; %s does: %s", name, tokenizer.eos_token)
            return
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    if found := next((end for end in _ENDS if end in special), None):
        tokenizer.eos_token = found
        log.warning("the tokenizer names no end-of-sequence token; taken: %s", found)


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

"""GGUF files: de-quantised by transformers and kept as an ordinary Transformers folder, which everything else reads.

So adapters trained on one have a base that plain transformers and peft load. What the conversion leaves wrong is put
right here: how a byte-level tokenizer splits its text, and the longest input.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.config.paths import cache_root
from tunesmith.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

SUFFIX = ".gguf"
_REVISION = 1
"""Raised when the conversion changes, so that older caches are not used."""
_SPLITS_LIKE_GPT2 = {"", "default", "gpt-2"}
_SAMPLE = 1 << 20


def converted(gguf: Path, weights: bool) -> Path:
    """Folder with the model of a GGUF file in Transformers' layout, made the first time.

    Args:
        gguf: the file.
        weights: False: configuration and tokenizer do.

    Raises:
        ModelError: not a whole GGUF file, of an architecture that transformers does not convert, or one part of several.
    """
    check(gguf)
    stem = f"{gguf.stem}-{_fingerprint(gguf)}-r{_REVISION}"
    whole, light = (cache_root() / "models" / (stem + ending) for ending in ("", "-tokenizer"))
    for folder in (whole,) if weights else (whole, light):
        if (folder / "config.json").is_file():
            return folder
    target = whole if weights else light
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".gguf-") as scratch:
        made = Path(scratch) / "made"
        tokenizer = read_tokenizer(gguf)
        if weights:
            log.info("%s: converting to a Transformers folder (once): %s", gguf, target)
            read_model(gguf, tokenizer).save_pretrained(made)
        else:
            _read("configuration", gguf, "AutoConfig").save_pretrained(made)
        tokenizer.save_pretrained(made)
        with contextlib.suppress(OSError):  # another process was faster; its result is the same
            made.rename(target)
    if not (target / "config.json").is_file():
        raise ModelError(f"{target}: could not be put in place; is the folder writable, is there space?")
    return target


def _fingerprint(gguf: Path) -> str:
    """Of size, first and last MiB: enough to tell files apart, cheap for large ones."""
    size = gguf.stat().st_size
    with gguf.open("rb") as file:
        digest = hashlib.sha256(str(size).encode() + file.read(_SAMPLE))
        file.seek(max(0, size - _SAMPLE))
        digest.update(file.read())
    return digest.hexdigest()[:12]


def check(gguf: Path) -> None:
    """Raise ModelError when the file is not a whole GGUF model."""
    with gguf.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelError(f"{gguf}: no GGUF file (it begins with {magic!r}); fetch or copy it again")
    parts = _fields(gguf).get("split.count", 0)
    if parts > 1:
        raise ModelError(f"{gguf}: one of {parts} parts; join them first: llama-gguf-split --merge FIRST_PART OUTPUT")


def _fields(gguf: Path) -> dict[str, Any]:
    """The few metadata that are needed here; reading them finds files that are cut off."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(gguf)
        wanted = ("split.count", "tokenizer.ggml.pre", "tokenizer.ggml.model")
        fields = {name: reader.fields[name].contents() for name in wanted if name in reader.fields}
        fields["types"] = {tensor.tensor_type.name for tensor in reader.tensors}
    except (ValueError, IndexError, KeyError, OSError, OverflowError, MemoryError) as error:
        raise ModelError(f"{gguf}: a damaged or cut-off GGUF file ({error}); fetch or copy it again") from None
    return fields


def read_model(gguf: Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model of a GGUF file with plain weights: in bf16 if they were quantised, else in the file's own type."""
    import torch

    types = _fields(gguf)["types"] - {"F32"}
    dtype = torch.bfloat16 if types - {"F16"} else torch.float16 if types else torch.float32
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that no switch turns off
        model = _read("model", gguf, "AutoModelForCausalLM", dtype=torch.float32, **_dequantized())
    tokenizer.model_max_length = model.config.max_position_embeddings
    return model.to(dtype)


def _dequantized() -> dict[str, Any]:
    import transformers

    config_class = getattr(transformers, "GgufConfig", None)
    # releases that can keep the blocks packed must be told to unpack them
    return {} if config_class is None else {"quantization_config": config_class(dequantize=True)}


def read_tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    """Tokenizer and chat template of a GGUF file."""
    from tokenizers import pre_tokenizers

    tokenizer = _read("tokenizer", gguf, "AutoTokenizer")
    fields = _fields(gguf)
    pre, kind = fields.get("tokenizer.ggml.pre", ""), fields.get("tokenizer.ggml.model")
    state = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {}
    if pre == "smollm":  # numbers are split into single digits before the byte-level step
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif kind == "gpt2" and state.get("type") == "ByteLevel" and pre not in _SPLITS_LIKE_GPT2:
        log.warning("%s: how its tokenizer splits text (%s) is not known; tokens may differ from the original's", gguf, pre)
    return tokenizer


def _read(what: str, gguf: Path, loader: str, **options: Any) -> Any:
    import transformers

    from tunesmith.model.library import quiet_library

    quiet_library()
    try:
        return getattr(transformers, loader).from_pretrained(
            gguf.parent, gguf_file=gguf.name, trust_remote_code=False, **options
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, IndexError, AttributeError) as error:
        reason = str(error).strip().splitlines()
        raise ModelError(f"cannot read the {what} of {gguf}: {reason[0] if reason else type(error).__name__}") from error

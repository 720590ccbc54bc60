"""What ``model_name_or_path`` names, and where its files are: nothing is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tunesmith.config.arguments import ModelArguments
from tunesmith.data.repository import HUB_NAME, PREFIX
from tunesmith.errors import ModelError
from tunesmith.model import builtin, gguf_file, hub
from tunesmith.model.files import (
    ADAPTER_CONFIG,
    CONFIG,
    check_adapter_folder,
    check_model_folder,
    read_json,
    refuse_file,
)
from tunesmith.model.origin import check_alone

_RUN = "config.yaml"
_KEY = "model_name_or_path"


@dataclass(frozen=True)
class Base:
    """What a local path holds.

    Attributes:
        kind: a whole model, an adapter, or a GGUF file.
        path: the folder, or the GGUF file.
        run: whether a run made it.
        base: of an adapter: the model it belongs to, as its configuration names it.
    """

    kind: Literal["model", "adapter", "gguf"]
    path: Path
    run: bool = False
    base: str | None = None


@dataclass(frozen=True)
class Source:
    """A model ready to be loaded.

    Attributes:
        path: folder in Transformers' layout, checked.
        name: by which others find it: what an adapter notes as its base. A hub id, or a path.
        trusted: whether Python code in ``path`` may run: only of a model that the user named.
        adapter: to be merged into it, if an adapter was named; its folder holds the tokenizer.
    """

    path: Path
    name: str
    trusted: bool = False
    adapter: Path | None = None

    @property
    def tokenizer(self) -> Path:
        """Folder of the tokenizer."""
        holds_one = self.adapter is not None and (self.adapter / "tokenizer_config.json").is_file()
        return self.adapter if holds_one and self.adapter is not None else self.path


def resolve_base(path: Path, key: str = _KEY) -> Base:
    """Say what a local path holds: a model, an adapter (with its base), the result of a run, or a GGUF file.

    Args:
        path: exists.
        key: of the configuration, for messages.

    Raises:
        ModelError: nothing that can be loaded; says what was found and what to give instead.
    """
    if path.is_file():
        if path.suffix == gguf_file.SUFFIX:
            return Base("gguf", path)
        raise refuse_file(path, key)
    run = (path / _RUN).is_file()
    if (path / ADAPTER_CONFIG).is_file():
        base = read_json(path / ADAPTER_CONFIG).get("base_model_name_or_path")
        if not isinstance(base, str) or not base:
            raise ModelError(f"{path / ADAPTER_CONFIG}: base_model_name_or_path does not say which model it belongs to")
        return Base("adapter", path, run, base)
    if (path / CONFIG).is_file():
        return Base("model", path, run)
    if run:
        raise ModelError(f"{key}: {path}: the run has not finished; go on with resume_from_checkpoint=auto")
    found = sorted(path.glob(f"*{gguf_file.SUFFIX}"))
    if len(found) == 1:
        return Base("gguf", found[0])
    if found:
        raise ModelError(f"{key}: {path} holds several GGUF files; give one of them: {', '.join(file.name for file in found)}")
    raise ModelError(f"{key}: {path} has no {CONFIG}, so it is not a model folder")


def locate(args: ModelArguments, weights: bool = True) -> Source:
    """Find, fetch and check the files of ``model_name_or_path``.

    Args:
        args: of the model.
        weights: False: configuration and tokenizer do; weights of a hub are not fetched then.

    Raises:
        ModelError: it is not there, cannot be fetched, cannot be loaded, or must not be.
    """
    return _locate(args.model_name_or_path, args, args.trust_remote_code, weights)


def _locate(named: str, args: ModelArguments, trusted: bool, weights: bool, nested: bool = False) -> Source:
    name = builtin.resolve(named)
    path = Path(name).expanduser()
    local = path.exists()
    if not local:
        _refuse_missing(named, path)
        repository = hub.repository_of(name, args)
        path = hub.fetch(repository, trusted, weights)
        name = repository.name if repository.hub == "hf_hub" else str(path)
    found = resolve_base(path)
    if found.kind == "gguf":
        path = gguf_file.converted(found.path, weights)
        return Source(path, str(path))
    if found.base is None:
        check_model_folder(path, trusted, weights or local)
        return Source(path, name, trusted)
    if nested:
        raise ModelError(f"{_KEY}: {path} is an adapter, and so is what was trained on it; name a model without adapters")
    check_adapter_folder(path)
    check_alone(path, _KEY)
    base = _locate(found.base, args, trusted=False, weights=weights, nested=True)
    return Source(base.path, name, adapter=path)


def _refuse_missing(named: str, path: Path) -> None:
    """Raise ModelError for a path that does not exist, unless it can be a name on a hub."""
    bare = named.removeprefix(PREFIX["ms_hub"]).removeprefix(PREFIX["hf_hub"])
    prefixed = bare != named
    if prefixed and HUB_NAME.fullmatch(bare):
        return
    if not HUB_NAME.fullmatch(bare) or bare.count("/") != 1 or path.suffix == gguf_file.SUFFIX:
        raise ModelError(f"{_KEY}: no such folder: {named}; give a folder, a GGUF file, a hub id or a built-in model")

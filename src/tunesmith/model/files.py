"""Whether the files of a model may and can be loaded, found from names, headers and JSON before any weight is read.

Weights come from safetensors (or GGUF) only: a pickle can run code when it is loaded, so there is no way to load one.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from tunesmith.errors import ModelError
from tunesmith.model.safetensors_file import Stored, read_header

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
VALUE_HEAD = "value_head.safetensors"
CLASSIFIER_HEAD = "base_model.model.score.weight"
"""Where PEFT's adapters of sequence classifiers keep the head, among their own weights."""

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".xz", ".bz2", ".zst", ".7z", ".rar")
_HEADS = ("value_head", "vhead", "v_head")
_LARGEST_JSON = 64 << 20


def refuse_file(path: Path, key: str) -> ModelError:
    """What to say of a file (that is no GGUF) given where a model folder is expected."""
    if path.suffix in _PICKLES:
        return ModelError(f"{key}: {path} is a pickle, or is named like one; {_CONVERT}")
    if path.suffix in _ARCHIVES:
        return ModelError(f"{key}: {path} is an archive; unpack it into a folder that you choose, and give that folder")
    if path.suffix == ".safetensors":
        return ModelError(f"{key}: {path} is one file of a model; give its folder {path.parent}, which must hold {CONFIG} too")
    return ModelError(f"{key}: {path} is a file; expected a model folder, a GGUF file or a hub id")


_CONVERT = (
    "pickled weights can run code and are never loaded. Take the safetensors version of the model, or convert it where nothing "
    "can be harmed: load it with the program that made it and write it with save_pretrained(..., safe_serialization=True)"
)

_CONVERT_HEAD = (
    "pickles can run code and are never loaded. Convert it where nothing can be harmed (safetensors.torch.save_file of its "
    f"tensors, as {VALUE_HEAD}), or remove it if no reward model is wanted"
)


def check_model_folder(folder: Path, trusted: bool = False, weights: bool = True) -> None:
    """Refuse a model folder that cannot or must not be loaded.

    Args:
        folder: in Transformers' layout.
        trusted: whether Python code of the model may run, so that its kind need not be known.
        weights: whether the weights are looked for too.

    Raises:
        ModelError: names the file, the reason and the fix.
    """
    check_config(folder, trusted)
    if weights:
        read_weight_headers(folder, WEIGHTS, INDEX)
        read_head_header(folder)


def check_adapter_folder(folder: Path) -> dict[str, Any]:
    """Refuse an adapter that cannot or must not be loaded; returns its configuration.

    Raises:
        ModelError: names the file, the reason and the fix.
    """
    config = read_json(folder / ADAPTER_CONFIG)
    if config.get("megatron_config") is not None:
        raise ModelError(f"{folder / ADAPTER_CONFIG}: megatron_config would import a module that the file names; refused")
    read_weight_headers(folder, ADAPTER_WEIGHTS, None)
    read_head_header(folder)
    return config


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model folder. Raises ModelError when it is missing, too large, or none."""
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise ModelError(f"{path}: {path.stat().st_size:,} bytes, too large for what it should be")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; fetch or copy the folder again") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON: {error}; fetch or copy it again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


# ---- config.json


def check_config(folder: Path, trusted: bool) -> dict[str, Any]:
    """``config.json`` of a folder, of a kind of model that transformers knows. Raises ModelError otherwise."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    path = folder / CONFIG
    config = read_json(path)
    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise ModelError(f"{path}: has no model_type, so it does not say which architecture the weights are of")
    for key, value in _implementations(config):
        raise ModelError(f"{path}: {key} {value!r} would fetch and run code of a hub; remove the entry")
    if "transformers_weights" in config:
        raise ModelError(
            f"{path}: transformers_weights names a weight file of its own; weights are read from {WEIGHTS}, or as "
            f"{INDEX} says; remove the entry"
        )
    if kind in CONFIG_MAPPING_NAMES or trusted:
        return config
    if config.get("auto_map"):
        raise ModelError(
            f"{path}: model_type {kind!r} is not known to transformers and comes as Python code beside the weights, which is "
            "not run; if you have read it, set trust_remote_code: true"
        )
    close = difflib.get_close_matches(kind, CONFIG_MAPPING_NAMES, n=1)
    hint = f"did you mean {close[0]!r}?" if close else "a newer transformers may know it (pip install -U transformers)"
    raise ModelError(f"{path}: unknown model_type {kind!r}; {hint}")


def _implementations(value: Any) -> Iterator[tuple[str, str]]:
    """Entries, at any depth, that name a kernel of a hub."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        if key.strip("_").endswith("_implementation"):
            for text in inner.values() if isinstance(inner, dict) else [inner]:
                if isinstance(text, str) and "/" in text:
                    yield key, text
        yield from _implementations(inner)


def vocabulary_size(config: dict[str, Any]) -> int | None:
    """Rows of the embedding as ``config.json`` says, if it does."""
    nested = config.get("text_config")
    size = config.get("vocab_size", nested.get("vocab_size") if isinstance(nested, dict) else None)
    return size if type(size) is int else None


# ---- weights


def read_weight_headers(folder: Path, single: str, index: str | None) -> dict[str, Stored]:
    """Every tensor of a folder's weights: of one file, or of the shards that an index names.

    Raises:
        ModelError: no safetensors, damaged ones, or an index that does not fit them.
    """
    if (folder / single).is_file():
        if index is not None and (folder / index).is_file():
            raise ModelError(
                f"{folder}: holds {single} and shards ({index}), and nothing says which count; remove one of the two"
            )
        return read_header(folder / single)
    if index is not None and (folder / index).is_file():
        return _read_shards(folder, folder / index)
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES and "training_args" not in path.name)
    if pickles:
        raise ModelError(f"{folder / pickles[0]}: holds the weights as a pickle, and there is no {single}; {_CONVERT}")
    raise ModelError(
        f"{folder}: holds no weights; expected {single}" + (f" or {index}" if index else "") + "; pickled ones are never loaded"
    )


def read_head_header(folder: Path) -> dict[str, Stored] | None:
    """The tensors of a value head beside a model or an adapter; None where there is none.

    Raises:
        ModelError: no safetensors, or damaged ones.
    """
    if (folder / VALUE_HEAD).is_file():
        return read_header(folder / VALUE_HEAD)
    pickles = [folder / (stem + suffix) for stem in _HEADS for suffix in _PICKLES]
    if found := next((path for path in pickles if path.is_file()), None):
        raise ModelError(f"{found}: holds a value head as a pickle, and there is no {VALUE_HEAD}; {_CONVERT_HEAD}")
    return None


def _read_shards(folder: Path, index: Path) -> dict[str, Stored]:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise ModelError(f"{index}: expected weight_map, tensor name -> file name")
    found: dict[str, Stored] = {}
    for shard in sorted(set(where.values())):
        stored = _read_shard(folder, index, shard, (name for name, file in where.items() if file == shard))
        if strays := sorted(name for name in stored if where.get(name, shard) != shard):
            raise ModelError(
                f"{index}: says that {strays[0]} is in {where[strays[0]]}, and {shard} holds it too ({len(strays)} such "
                "tensors), so which one is meant cannot be told; fetch or copy the folder again"
            )
        found.update(stored)
    return found


def _read_shard(folder: Path, index: Path, shard: str, named: Iterable[str]) -> dict[str, Stored]:
    if PurePosixPath(shard).is_absolute() or ".." in PurePosixPath(shard).parts or "\\" in shard or ":" in shard:
        raise ModelError(f"{index}: names {shard!r}, which leaves the folder; refused")
    if not shard.endswith(".safetensors"):
        raise ModelError(f"{index}: names {shard!r}, which is no safetensors file; {_CONVERT}")
    if not (folder / shard).is_file():
        raise ModelError(f"{index}: names {shard}, which is not there; fetch or copy the missing file")
    stored = read_header(folder / shard)
    if absent := sorted(set(named) - stored.keys()):
        raise ModelError(f"{index}: says that {absent[0]} is in {shard}, which does not hold it ({len(absent)} such tensors)")
    return stored

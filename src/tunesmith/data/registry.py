"""Data sets by name: ``dataset_info.json`` in the format that the ecosystem shares, a path, or a name on a hub."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from pydantic import ValidationError

from tunesmith.config.arguments import DatasetAttr
from tunesmith.data.files import ending
from tunesmith.data.repository import HUB_NAME, PREFIX, prefers_modelscope
from tunesmith.errors import DataError

REGISTRY_NAME = "dataset_info.json"

_PLAIN_KEYS = ("file_name", "formatting", "ranking", "subset", "split", "folder", "num_samples", "source_prefix", "revision")
_HASH_KEYS = {
    "file_sha1": "dataset_sha1",
    "dataset_sha1": "dataset_sha1",
    "file_sha256": "dataset_sha256",
    "dataset_sha256": "dataset_sha256",
}
_HUB_KEYS = {"hf_hub_url": "hf_hub", "ms_hub_url": "ms_hub"}
_ELSEWHERE = {
    "om_hub_url": "sets of the Modelers hub are not fetched; fetch one and give file_name, or give hf_hub_url or ms_hub_url",
    "script_url": "a loading script is code, and code of a data set is never run; fetch the data files and give file_name",
    "cloud_file_name": "cloud storage is not read; copy the file into dataset_dir and give file_name",
}
_KEYS = (*_PLAIN_KEYS, *_HASH_KEYS, *_HUB_KEYS, *_ELSEWHERE, "columns", "tags")
_COLUMNS = ("prompt", "query", "response", "history", "system", "messages", "tools", "chosen", "rejected", "margin", "kto_tag")
_MEDIA = ("images", "videos", "audios")
_TAGS = ("role_tag", "content_tag", "user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag")
_DEFAULTS: Mapping[str, Mapping[str, str]] = {
    "text": {"prompt_column": "text"},
    "openai": {
        "messages_column": "messages",
        "tools_column": "tools",
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "observation_tag": "tool",
    },
}


def load_attrs(dataset_dir: str, names: tuple[str, ...], prefix: str = "") -> list[DatasetAttr]:
    """Look up data sets by name.

    A name is an entry of ``dataset_info.json``, else the path of an existing file or folder, else ``hf:org/name`` or
    ``ms:org/name``, with ``@revision`` if one is wanted. The layout of the rows of a path or hub name is found later.

    Args:
        dataset_dir: folder that holds ``dataset_info.json``; not needed for paths and hub names.
        names: what to look up.
        prefix: ``source_prefix`` of the configuration: one text for all sets, or one per set divided by ``|``.

    Raises:
        DataError: unreadable registry, unknown name (with the nearest one), unknown or unsupported key, a number of
            prefixes that is not the number of sets.
    """
    path = Path(dataset_dir) / REGISTRY_NAME
    registry = _read_registry(path) if path.exists() else None
    prefixes = prefix.split("|")
    prefixes = prefixes * len(names) if len(prefixes) == 1 else prefixes
    if len(prefixes) != len(names):
        raise DataError(f"source_prefix: {len(prefixes)} prefixes for {len(names)} data sets; give one, or one per set")
    attrs = []
    for name, own_prefix in zip(names, prefixes, strict=True):
        if registry is not None and name in registry:
            attrs.append(parse_entry(name, registry[name], path, own_prefix))
        else:
            attrs.append(_parse_name(name, path, registry, own_prefix))
    return attrs


def parse_entry(name: str, entry: Any, path: Path, prefix: str = "") -> DatasetAttr:
    """One entry of the registry. Naming any column unsets the unnamed ones, as elsewhere in the ecosystem.

    Args:
        name: of the data set.
        entry: value under that name.
        path: of ``dataset_info.json``; its folder is where ``file_name`` is looked for.
        prefix: ``source_prefix`` of the configuration; the entry's own if empty.

    Raises:
        DataError: naming entry and key.
    """
    where = f"{path}: {name!r}"
    if not isinstance(entry, dict):
        raise DataError(f"{where}: expected an object of attributes, found {type(entry).__name__}")
    _check_known("key", entry, _KEYS, where)
    entry = {key: value for key, value in entry.items() if value is not None}
    formatting = entry.get("formatting")
    defaults = _DEFAULTS.get(formatting, {}) if isinstance(formatting, str) else {}
    values: dict[str, Any] = {"dataset_name": name, **defaults}
    values |= {key: entry[key] for key in _PLAIN_KEYS if key in entry and key != "file_name"}
    values |= _hashes(entry, where)
    values |= _columns(entry, where)
    values |= _tags(entry, where)
    values |= _place(entry, path, where)
    if prefix:
        values["source_prefix"] = prefix
    try:
        return DatasetAttr(**values)
    except ValidationError as error:
        problems = "; ".join(f"{item['loc'][0]}: {item['msg']}" for item in error.errors(include_url=False))
        raise DataError(f"{where}: {problems}") from None


def check_file_name(name: str, where: str) -> None:
    """Refuse a ``file_name`` that is no plain path below ``dataset_dir``; opens nothing.

    Raises:
        DataError: an address, an absolute path, or one with ``..``.
    """
    windows = PureWindowsPath(name)
    outside = PurePosixPath(name).is_absolute() or windows.drive or windows.root or ".." in windows.parts
    if outside or "://" in name or name.startswith("file:") or "\0" in name:
        raise DataError(
            f"{where}: file_name {name!r} leaves dataset_dir; expected a path inside it. "
            "To read a file from elsewhere, give its path as dataset in the configuration"
        )


def _read_registry(path: Path) -> dict[str, Any]:
    try:
        registry = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}:{error.colno}  not valid JSON: {error.msg}. Correct the file there") from None
    except _Twice as error:
        raise DataError(f"{path}: the name {str(error)!r} stands twice in one object; remove or rename one") from None
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read: {error}. It must be a UTF-8 file") from None
    if not isinstance(registry, dict):
        raise DataError(f"{path}: expected one object of name -> attributes, found {type(registry).__name__}")
    return registry


class _Twice(Exception):
    """A key of the registry that a plain parser would let overwrite the first of its name."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _Twice(key)
        found[key] = value
    return found


# ---- names that are no entries


def _parse_name(name: str, path: Path, registry: Mapping[str, Any] | None, prefix: str) -> DatasetAttr:
    for load_from, mark in PREFIX.items():
        if name.startswith(mark):
            url, _, revision = name.removeprefix(mark).partition("@")
            if not HUB_NAME.fullmatch(url) or ("@" in name and not revision):
                raise DataError(f"data set {name!r}: expected {mark}org/name or {mark}org/name@revision")
            return DatasetAttr(
                dataset_name=name,
                load_from=load_from,
                hub_url=url,
                revision=revision or None,
                formatting="auto",
                source_prefix=prefix,
            )
    is_path = "/" in name or os.sep in name or bool(ending(Path(name)))
    if is_path and "\0" not in name and Path(name).exists():
        return DatasetAttr(dataset_name=name, file_name=name, inline=True, formatting="auto", source_prefix=prefix)
    raise DataError(_not_found(name, path, registry, is_path))


def _not_found(name: str, path: Path, registry: Mapping[str, Any] | None, is_path: bool) -> str:
    if registry is None:
        other = f", and there is no {path}, which would list data sets by name; correct the path or dataset_dir"
    else:
        close = difflib.get_close_matches(name, registry, n=1)
        listed = f"it lists: {', '.join(sorted(registry)[:12])}" if registry else "it is empty"
        other = f", and {path} has no such entry; " + (f"did you mean {close[0]!r}?" if close else listed)
    if not is_path and Path(name).is_dir():
        other += f"; to read the folder of that name, write ./{name}"
    return f"data set {name!r}: {'no such file or folder' if is_path else 'no path, no hub name'}{other}"


# ---- parts of an entry


def _check_known(what: str, found: Iterable[str], known: Collection[str], where: str) -> None:
    for name in found:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise DataError(f"{where}: unknown {what} {name!r}; {hint}Understood: {', '.join(known)}")


def _hashes(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, attribute in _HASH_KEYS.items():
        if key in entry and values.setdefault(attribute, entry[key]) != entry[key]:
            raise DataError(f"{where}: {key} and {attribute} differ; keep the right one")
    return values


def _columns(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    if "columns" not in entry:
        return {}
    columns = entry["columns"]
    if not isinstance(columns, dict):
        raise DataError(f"{where}: columns must be an object, found {type(columns).__name__}")
    if media := [key for key in _MEDIA if columns.get(key) is not None]:
        raise DataError(
            f"{where}: the columns {', '.join(media)} are not text; only text is trained on. Choose another data set"
        )
    _check_known("column", columns, (*_COLUMNS, *_MEDIA), f"{where}: columns")
    return {f"{key}_column": columns.get(key) for key in _COLUMNS}


def _tags(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    tags = entry.get("tags", {})
    if not isinstance(tags, dict):
        raise DataError(f"{where}: tags must be an object, found {type(tags).__name__}")
    _check_known("tag", tags, _TAGS, f"{where}: tags")
    return {key: value for key, value in tags.items() if value is not None}


def _place(entry: Mapping[str, Any], path: Path, where: str) -> dict[str, Any]:
    """Where the set is read from: the file if it is there, else a hub."""
    if "script_url" in entry:
        raise DataError(f"{where}: script_url: {_ELSEWHERE['script_url']}")
    hubs = [key for key in _HUB_KEYS if key in entry]
    if "file_name" in entry:
        name = entry["file_name"]
        if not isinstance(name, str) or not name:
            raise DataError(f"{where}: file_name: expected a path, found {name!r}")
        check_file_name(name, where)
        if not hubs or (path.parent / name).exists():
            return {"file_name": name}
    if hubs:
        wanted = "ms_hub_url" if prefers_modelscope() else "hf_hub_url"
        key = wanted if wanted in hubs else hubs[0]
        if not isinstance(entry[key], str) or not HUB_NAME.fullmatch(entry[key]):
            raise DataError(f"{where}: {key}: expected org/name, found {entry[key]!r}")
        return {"load_from": _HUB_KEYS[key], "hub_url": entry[key]}
    for key, reason in _ELSEWHERE.items():
        if key in entry:
            raise DataError(f"{where}: {key}: {reason}")
    raise DataError(f"{where}: names no data; give file_name, hf_hub_url or ms_hub_url")

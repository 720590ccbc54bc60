"""``dataset_info.json``: names -> ``DatasetAttr``, in the format that the ecosystem shares."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tunesmith.config.arguments import DatasetAttr
from tunesmith.errors import DataError

REGISTRY_NAME = "dataset_info.json"
_TOP_KEYS = {"file_name": "file_name", "formatting": "formatting", "num_samples": "num_samples",
             "file_sha1": "dataset_sha1", "dataset_sha1": "dataset_sha1", "source_prefix": "source_prefix"}  # fmt: skip
_COLUMNS = {"prompt": "prompt_column", "query": "query_column", "response": "response_column",
            "history": "history_column", "system": "system_column", "messages": "messages_column"}  # fmt: skip
_TAGS = ("role_tag", "content_tag", "user_tag", "assistant_tag", "system_tag")
_UNUSED_TAGS = ("observation_tag", "function_tag")
_ELSEWHERE = {"hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name"}


def load_attrs(dataset_dir: str, names: tuple[str, ...], prefix: str = "") -> list[DatasetAttr]:
    """Look up data sets by name.

    Args:
        dataset_dir: folder that holds ``dataset_info.json``.
        names: entries to look up.
        prefix: ``source_prefix`` of the configuration: one text for all sets, or one per set divided by ``|``.

    Raises:
        DataError: unreadable registry, unknown name (with the nearest one), unknown or unsupported key.
    """
    path = Path(dataset_dir) / REGISTRY_NAME
    registry = _read_registry(path)
    prefixes = prefix.split("|")
    prefixes = prefixes * len(names) if len(prefixes) == 1 else prefixes
    attrs = []
    for name, own_prefix in zip(names, prefixes, strict=True):
        if name not in registry:
            close = difflib.get_close_matches(name, registry, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it lists: {', '.join(sorted(registry)[:12])}"
            raise DataError(f"{path}: no data set named {name!r}; {hint}")
        attrs.append(parse_entry(name, registry[name], path, own_prefix))
    return attrs


def _read_registry(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(f"{path}: no such file. dataset_dir must hold a {REGISTRY_NAME} that lists the data sets")
    try:
        registry = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}:{error.colno}  not valid JSON: {error.msg}") from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    if not isinstance(registry, dict):
        raise DataError(f"{path}: expected one object of name -> attributes")
    return registry


def parse_entry(name: str, entry: Any, path: Path, prefix: str = "") -> DatasetAttr:
    """One entry of the registry -> ``DatasetAttr``. Naming any column unsets the unnamed ones, as elsewhere."""
    where = f"{path}: {name!r}"
    if not isinstance(entry, dict):
        raise DataError(f"{where}: expected an object, found {type(entry).__name__}")
    values: dict[str, Any] = {"dataset_name": name}
    for key, value in entry.items():
        if key in _TOP_KEYS:
            values[_TOP_KEYS[key]] = value
        elif (key == "ranking" and value is False) or key in ("columns", "tags"):
            continue
        elif key == "ranking":
            raise DataError(f"{where}: holds preference pairs (ranking: true); supervised fine-tuning needs one answer a row")
        elif key in _ELSEWHERE:
            if "file_name" not in entry:
                raise DataError(f"{where}: {key} is not supported in this version; download the set and give file_name")
        else:
            raise DataError(
                f"{where}: unknown key {key!r}; understood: {', '.join([*_TOP_KEYS, 'columns', 'tags', 'ranking'])}"
            )
    if "file_name" not in entry:
        raise DataError(f"{where}: file_name is missing; name the .json, .jsonl or .txt file")
    values.update(_columns(entry.get("columns"), where))
    values.update(_tags(entry.get("tags"), where))
    if prefix:
        values["source_prefix"] = prefix
    try:
        return DatasetAttr(**values)
    except ValidationError as error:
        problems = "; ".join(f"{item['loc'][0]}: {item['msg']}" for item in error.errors(include_url=False))
        raise DataError(f"{where}: {problems}") from None


def _columns(columns: Any, where: str) -> dict[str, Any]:
    if columns is None:
        return {}
    if not isinstance(columns, dict):
        raise DataError(f"{where}: columns must be an object")
    unknown = set(columns) - set(_COLUMNS)
    if unknown:
        known = ", ".join(_COLUMNS)
        raise DataError(
            f"{where}: columns not supported for supervised text: {', '.join(sorted(unknown))}; understood: {known}"
        )
    return {attr: columns.get(key) for key, attr in _COLUMNS.items()}


def _tags(tags: Any, where: str) -> dict[str, Any]:
    if tags is None:
        return {}
    if not isinstance(tags, dict):
        raise DataError(f"{where}: tags must be an object")
    unknown = set(tags) - set(_TAGS) - set(_UNUSED_TAGS)
    if unknown:
        raise DataError(f"{where}: unknown tags: {', '.join(sorted(unknown))}; understood: {', '.join(_TAGS)}")
    return {key: value for key, value in tags.items() if key in _TAGS}


def resolve_file(attr: DatasetAttr, dataset_dir: str) -> Path:
    """Path of a data set's file. Raises DataError when it is missing or lies outside ``dataset_dir``."""
    assert attr.file_name is not None, "parse_entry refuses an entry without a file"
    root = Path(dataset_dir).resolve()
    path = Path(dataset_dir) / attr.file_name
    if "://" in attr.file_name or not path.resolve().is_relative_to(root):
        raise DataError(f"data set {attr.dataset_name!r}: file_name {attr.file_name!r} leaves dataset_dir {dataset_dir!r}")
    if path.is_dir():
        raise DataError(f"data set {attr.dataset_name!r}: {path} is a folder; give a .json, .jsonl or .txt file")
    if not path.is_file():
        raise DataError(f"data set {attr.dataset_name!r}: no such file: {path}")
    return path

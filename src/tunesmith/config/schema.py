"""The keys, described: a table for people and a JSON Schema for editors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic_core import PydanticUndefined

from tunesmith.config.arguments import SECTIONS


def describe_keys() -> Iterator[tuple[str, str, str, str, str]]:
    """Yield (section, key, type, default, meaning) for every key."""
    for section, cls in SECTIONS.items():
        properties = cls.model_json_schema()["properties"]
        for key, info in cls.model_fields.items():
            if info.default_factory is not None:
                default = "{}"
            elif info.default is PydanticUndefined:
                default = "required"
            else:
                default = _plain(info.default)
            yield section, key, _type_name(properties[key]), default, info.description or ""


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of the flat configuration file."""
    properties: dict[str, Any] = {}
    required: list[str] = []
    for cls in SECTIONS.values():
        schema = cls.model_json_schema()
        properties.update(schema["properties"])
        required.extend(schema.get("required", []))
    lists = [name for name, schema in properties.items() if schema.get("type") == "array"]  # commas will do, too
    for name in [*lists, "optim_args"]:
        written = dict(properties[name])
        about = {key: written.pop(key) for key in ("description", "default") if key in written}
        properties[name] = {"anyOf": [written, {"type": "string"}], **about}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "tunesmith configuration",
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _plain(value: Any) -> str:
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(value) or "none"
    return str(value) if value != "" else '""'


def _type_name(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return " | ".join(_plain(v) for v in schema["enum"])
    if "const" in schema:
        return _plain(schema["const"])
    if "anyOf" in schema:
        return " | ".join(_type_name(s) for s in schema["anyOf"] if s.get("type") != "null")
    if schema.get("type") == "array":
        return "list"
    names = {"string": "text", "number": "number", "integer": "whole number", "boolean": "true | false", "object": "mapping"}
    return names.get(schema.get("type", ""), "value")

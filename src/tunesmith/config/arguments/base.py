"""What all argument classes have in common: their base, and types of fields that several use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


def split_commas(value: Any) -> Any:
    """``"a, b"`` -> a tuple of texts; nothing -> an empty one."""
    if value is None:
        return ()
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


NameList = Annotated[tuple[str, ...], BeforeValidator(split_commas)]
"""A list of names; a YAML list or one string with commas."""


def weighted(value: Any) -> Any:
    """``sigmoid``, ``sigmoid: 1, sft: 0.2`` or ``path/to/file.py:name: 1`` -> name -> weight."""
    if not isinstance(value, str):
        return value
    parts = [_weighted(part) for part in value.split(",") if part.strip()]
    if len(dict(parts)) < len(parts):
        raise ValueError("has a name twice; give each once, with its weight")
    return dict(parts)


def _weighted(part: str) -> tuple[str, str | float]:
    name, colon, weight = part.strip().rpartition(":")
    if not colon or name.endswith(".py"):
        return part.strip(), 1.0
    return name.strip(), weight.strip()


class Arguments(BaseModel):
    """Base of all argument classes: frozen, no unknown key, no NaN, no silent change of type."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=(), use_attribute_docstrings=False
    )

    def save_to_json(self, path: str | Path) -> None:
        """Write the fields to ``path`` as JSON, keys sorted."""
        text = json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True, ensure_ascii=False)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load_from_json(cls, path: str | Path) -> Arguments:
        """Read what ``save_to_json`` wrote. Raises pydantic's ``ValidationError`` on a wrong value."""
        return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))

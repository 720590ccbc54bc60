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
    """``sigmoid`` or ``sigmoid: 1, sft: 0.2`` -> name -> weight."""
    if not isinstance(value, str):
        return value
    parts = [part.partition(":") for part in value.split(",") if part.strip()]
    weights = {name.strip(): weight.strip() if colon else 1.0 for name, colon, weight in parts}
    if len(weights) < len(parts):
        raise ValueError("names a loss twice; give each once, with its weight")
    return weights


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

from __future__ import annotations

import json

from tests.conftest import tunesmith
from tunesmith.config.arguments import SECTIONS
from tunesmith.config.schema import describe_keys, json_schema


def test_every_key_is_described() -> None:
    rows = list(describe_keys())
    assert len(rows) == sum(len(cls.model_fields) for cls in SECTIONS.values())
    for _, key, kind, default, meaning in rows:
        assert kind not in ("", "value"), key
        assert default != "", key
        assert meaning.endswith("."), key


def test_schema_lists_every_key_and_refuses_others() -> None:
    schema = json_schema()
    assert set(schema["properties"]) == {key for cls in SECTIONS.values() for key in cls.model_fields}
    assert schema["additionalProperties"] is False
    assert set(schema["required"]) == {"model_name_or_path", "output_dir"}
    assert {"type": "string"} in schema["properties"]["dataset"]["anyOf"]


def test_command_prints_both() -> None:
    assert json.loads(tunesmith("config", "--schema").stdout)["title"] == "tunesmith configuration"
    listing = tunesmith("config").stdout
    assert "lora_rank  (whole number; default 8)" in listing

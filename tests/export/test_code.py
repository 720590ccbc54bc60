"""A base that comes as Python code is exported only when the user names it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.export.test_export import proof_of
from tunesmith.errors import ConfigError, ModelError

CODE = """
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

Path(__file__).with_name("ran").touch()


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own(tiny_model: Path, tmp_path: Path) -> Path:
    """A model folder with code of its own, in another place for each test, as modules are kept by name."""
    base = tmp_path / "own"
    shutil.copytree(tiny_model, base)
    (base / "code_of_own.py").write_text(CODE, encoding="utf-8")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "code_of_own.OwnConfig", "AutoModelForCausalLM": "code_of_own.OwnModel"},
    }
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return base


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_code_runs_only_of_a_model_that_is_named(
    own: Path, trained: Any, export_here: Any, kind: str, monkeypatch: Any, tmp_path: Path
) -> None:
    run = trained(model_name_or_path=str(own), trust_remote_code=True, finetuning_type=kind)
    with pytest.raises(ModelError, match="Python code beside the weights"):
        export_here(run)
    named = {"base": str(own)} if kind == "lora" else {}
    if named:
        with pytest.raises(ConfigError, match=f"only of a model that you name.*--base {own}"):
            export_here(run, trust_remote_code=True)
    output, _ = export_here(run, trust_remote_code=True, **named)
    assert proof_of(output)["export"]["max"] <= 1e-4
    card = (output / "README.md").read_text(encoding="utf-8")
    assert 'AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)' in card
    assert (output / "code_of_own.py").is_file()

"""Chat templates that try to get out of their sandbox, wherever a template can stand and whatever reads it (M5)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.conftest import CHATML, make_rows, tunesmith

ATTACKS = {
    "mro": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "attr": "{{ (messages | attr('__class__')).mro() }}",
    "format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "map": "{{ (messages | map(attribute='__class__') | first).mro() }}",
    "map method": "{{ (['touch CANARY'] | map('__import__') | list) }}",
}


@pytest.fixture
def hostile(settings: dict[str, Any], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A configuration whose model lies in ``tmp_path/model``, run from a folder in which a canary would appear."""
    shutil.copytree(tiny_model, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return {**settings, "model_name_or_path": str(tmp_path / "model"), "max_steps": 1}


def put(template: str, model: Path, place: str) -> None:
    """Make a template that of a model, in one of the two files that hold templates."""
    (model / "chat_template.jinja").unlink()
    if place == "chat_template.jinja":
        (model / place).write_text(template, encoding="utf-8")
    else:
        config = json.loads((model / place).read_text(encoding="utf-8"))
        (model / place).write_text(json.dumps({**config, "chat_template": template}), encoding="utf-8")
    assert AutoTokenizer.from_pretrained(model).chat_template == template


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_m5_nothing_gets_out(hostile: dict[str, Any], write_config: Any, tmp_path: Path, attack: str, place: str) -> None:
    model = tmp_path / "model"
    put(CHATML + ATTACKS[attack], model, place)
    config = write_config(hostile)
    answered = {
        "check": tunesmith("check", config, "--json", check=False),
        "preview": tunesmith("preview", config, check=False),
        "train": tunesmith("train", config, check=False),
        "chat": tunesmith("chat", model, "--prompt", "the cat", "max_new_tokens=1", check=False),
    }
    assert not (tmp_path / "CANARY").exists()
    assert not Path(hostile["output_dir"]).exists()
    for verb, done in answered.items():
        assert done.returncode == (1 if verb == "check" else 2), (verb, done)
        assert "the chat template" in done.stdout + done.stderr, (verb, done)
        assert "Traceback" not in done.stderr
        assert "<class" not in done.stdout


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja"])
def test_m5_a_good_template_in_either_file_is_used(
    hostile: dict[str, Any], write_config: Any, tmp_path: Path, place: str
) -> None:
    put(CHATML.replace("m['content'] +", "'> ' + m['content'] +"), tmp_path / "model", place)
    assert f"> {make_rows(1)[0]['instruction']}<|im_end|>" in tunesmith("preview", write_config(hostile)).stdout

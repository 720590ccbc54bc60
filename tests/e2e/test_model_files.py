"""Hostile and damaged model files through the command line (M1, M3, M8): refused by name, nothing run, nothing written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import tunesmith


class Payload:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "CANARY"


@pytest.fixture
def model(settings: dict[str, Any], tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, which the settings name."""
    shutil.copytree(tiny_model, tmp_path / "model")
    settings.update(model_name_or_path=str(tmp_path / "model"), max_steps=1)
    return tmp_path / "model"


@pytest.fixture
def refused(settings: dict[str, Any], write_config: Any, canary: Path) -> Callable[..., None]:
    """Every verb refuses the settings' model, at once and with these words; the canary and the output stay untouched."""

    def verify(*words: str, verbs: tuple[str, ...] = ("train", "check", "chat"), **extra: Any) -> None:
        config = write_config({**settings, **extra})
        for verb in verbs:
            begun = time.monotonic()
            arguments = [settings["model_name_or_path"], "--prompt", "the"] if verb == "chat" else [config]
            options = [f"{key}={json.dumps(value)}" for key, value in extra.items()] if verb == "chat" else []
            done = tunesmith(verb, *arguments, *options, check=False)
            said = done.stdout + done.stderr
            assert done.returncode == (1 if verb == "check" else 2), (verb, said)
            assert all(word in said for word in words), (verb, said)
            assert "Traceback" not in said
            assert time.monotonic() - begun < 10
        assert not canary.exists()
        assert not Path(settings["output_dir"]).exists()

    return verify


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_m1_pickled_weights(model: Path, canary: Path, refused: Any, how: str) -> None:
    (model / "model.safetensors").unlink()
    if how == "pickle":
        (model / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(canary)))
    else:
        torch.save(Payload(canary), model / "pytorch_model.bin")
    refused("pytorch_model.bin: holds the weights as a pickle", "save_pretrained")
    (model / "pytorch_model.bin").rename(model / "model.safetensors")
    refused("model.safetensors: ", "pickle")


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors"])
def test_m1_a_pickled_adapter(model: Path, settings: Any, canary: Path, refused: Any, tmp_path: Path, name: str) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(model)}))
    (adapter / name).write_bytes(pickle.dumps(Payload(canary)))
    refused(name, "pickle", verbs=("train",), checkpoint_dir=str(adapter))
    settings["model_name_or_path"] = str(adapter)
    refused(name, "pickle")


def test_m1_the_adapter_of_a_run_is_replaced(model: Path, settings: Any, write_config: Any, canary: Path) -> None:
    tunesmith("train", write_config(settings))
    run = Path(settings["output_dir"])
    for name in ("adapter_model.bin", "adapter_model.safetensors"):
        (run / "adapter_model.safetensors").unlink(missing_ok=True)
        (run / name).write_bytes(pickle.dumps(Payload(canary)))
        done = tunesmith("chat", run, "--prompt", "the", check=False)
        assert done.returncode == 2
        assert name in done.stderr
    assert not canary.exists()


@pytest.mark.parametrize("flag", ["absent", None, "false", 0])
@pytest.mark.parametrize("kind", ["evil", "llama"])
def test_m3_code_beside_a_model(
    model: Path, settings: Any, write_config: Any, canary: Path, refused: Any, flag: Any, kind: str
) -> None:
    code = f"open({str(canary)!r}, 'w')\nclass Evil: pass\n"
    for name in ("evil.py", "chat_template.py", "processor.py"):
        (model / name).write_text(code)
    for name, classes in (
        ("config.json", {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoProcessor": "processor.Evil"}),
        ("preprocessor_config.json", {"AutoProcessor": "processor.Evil"}),
    ):
        values = json.loads((model / name).read_text()) if (model / name).exists() else {}
        values["auto_map"] = classes
        if name == "config.json":
            values["model_type"] = kind
        (model / name).write_text(json.dumps(values))
    extra = {} if flag == "absent" else {"trust_remote_code": flag}
    if kind == "evil":
        refused("trust_remote_code: true", **extra)
        return
    config = write_config({**settings, **extra})  # a kind that transformers has itself: its own classes are used
    for verb in ("check", "train"):
        tunesmith(verb, config, check=False)
    assert not canary.exists()


def test_m3_trust_does_not_reach_the_base_of_an_adapter(
    model: Path, settings: Any, canary: Path, refused: Any, tmp_path: Path
) -> None:
    (model / "evil.py").write_text(f"open({str(canary)!r}, 'w')\n")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(model)}))
    (adapter / "adapter_model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    settings["model_name_or_path"] = str(adapter)
    refused("config.json", "which is not run", trust_remote_code=True)


def test_m3_a_run_folder_cannot_ask_for_trust(model: Path, settings: Any, write_config: Any, canary: Path) -> None:
    tunesmith("train", write_config(settings))
    run = Path(settings["output_dir"])
    (model / "evil.py").write_text(f"open({str(canary)!r}, 'w')\n")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}))
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("trust_remote_code: false", "trust_remote_code: true"))
    done = tunesmith("chat", run, "--prompt", "the", check=False)
    assert done.returncode == 2
    assert "which is not run" in done.stderr
    assert not canary.exists()


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_m8_an_archive_as_model_or_data(
    model: Path, settings: Any, write_config: Any, refused: Any, tmp_path: Path, kind: str
) -> None:
    archive = tmp_path / f"model.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as writer:
            writer.writestr("../escaped", "x")
            writer.writestr("/escaped", "x")
            writer.writestr("bomb", bytes(50 << 20))
    else:
        with tarfile.open(archive, "w") as tar:
            link = tarfile.TarInfo("link")
            link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
            tar.addfile(link)
            tar.addfile(tarfile.TarInfo("link/escaped"))
            hard = tarfile.TarInfo("hard")
            hard.type, hard.linkname = tarfile.LNKTYPE, "/etc/passwd"
            tar.addfile(hard)
    before = sorted(tmp_path.rglob("*"))
    refused(f"model.{kind}", "archive", verbs=("train", "check"), model_name_or_path=str(archive))
    refused(f"model.{kind}", verbs=("train", "check"), dataset=str(archive))
    assert sorted(path for path in tmp_path.rglob("*") if path.name != "config.yaml") == before
    assert not (tmp_path / "escaped").exists()


def test_m8_an_index_that_leaves_the_folder(model: Path, refused: Any, tmp_path: Path) -> None:
    (model / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "../outside.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused("model.safetensors.index.json: names '../outside.safetensors', which leaves the folder; refused")


def test_damaged_and_foreign_files(model: Path, settings: Any, refused: Any) -> None:
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[:-1])
    refused("model.safetensors: a damaged or cut-off safetensors file")
    (model / "model.safetensors").write_bytes(weights)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))
    refused("the tokenizer has 349 tokens, vocab_size in config.json is 300; they do not belong together")
    (model / "config.json").write_text(json.dumps(config))
    (model / "chat_template.jinja").unlink()
    refused("has no chat template; name one with template:")
    (model / "tokenizer.json").write_text('{"model": 1}')
    refused("cannot load the tokenizer of")

"""Models of hubs, against a local stand-in for one and a stand-in for the other's client."""

from __future__ import annotations

import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from tests.conftest import tunesmith
from tests.standin import hub
from tunesmith.config.arguments import ModelArguments
from tunesmith.errors import ModelError
from tunesmith.model.hub import fetch
from tunesmith.model.load import load_pretrained
from tunesmith.model.source import locate
from tunesmith.model.tokenizer import load_tokenizer

Files = dict[str, bytes]


@pytest.fixture
def files(tiny_model: Path) -> Files:
    return {path.name: path.read_bytes() for path in tiny_model.iterdir()}


@pytest.fixture
def cut() -> dict[str, int]:
    return {}


@pytest.fixture
def asked(files: Files, cut: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    extra = {"evil.py": b"raise SystemExit", "pytorch_model.bin": b"\x80\x04.", "onnx/model.json": b"{}"}
    pickled = {name: data for name, data in files.items() if name != "model.safetensors"} | {"pytorch_model.bin": b"\x80\x04."}
    repos = {"org/tiny": files | extra, "org/pickled": pickled, "gated/tiny": files}
    fetch.cache_clear()
    with hub("models", repos, tmp_path, monkeypatch, cut) as requests:
        yield requests
    fetch.cache_clear()


def model(name: str, **values: Any) -> ModelArguments:
    return ModelArguments(model_name_or_path=name, compute_dtype="fp32", **values)


def fetched(asked: list[str]) -> set[str]:
    return {request.rpartition("/")[2] for request in asked if request.startswith("GET") and "/resolve/" in request}


def test_a_tokenizer_alone_needs_no_weights(asked: list[str], tmp_path: Path) -> None:
    args = model("org/tiny", model_revision="v1", cache_dir=str(tmp_path / "mine"))
    assert load_tokenizer(args).chat_template
    assert "GET /api/models/org/tiny/revision/v1" in asked
    assert not {"model.safetensors", "pytorch_model.bin", "evil.py", "model.json"} & fetched(asked)
    before = len(asked)
    loaded, _ = load_pretrained(args)
    assert loaded.num_parameters() > 0
    assert fetched(asked[before:]) == {"model.safetensors"}
    source = locate(args)
    assert source.name == "org/tiny"  # what an adapter notes as its base
    assert source.path.is_relative_to(tmp_path / "mine")


def test_a_run_on_a_model_of_a_hub(asked: list[str], settings: dict[str, Any], write_config: Any) -> None:
    config = write_config({**settings, "model_name_or_path": "hf:org/tiny", "max_steps": 1})
    tunesmith("train", config)
    assert '"base_model_name_or_path": "org/tiny"' in (Path(settings["output_dir"]) / "adapter_config.json").read_text()


def test_an_interrupted_download_is_gone_on_from(
    asked: list[str], cut: dict[str, int], files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # the client waits before it tries again
    cut["model.safetensors"] = 1
    path = locate(model("org/tiny")).path
    assert (path / "model.safetensors").read_bytes() == files["model.safetensors"]
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    gated = model("gated/tiny", use_auth_token=True)
    cut["tokenizer.json"] = 99
    with pytest.raises(ModelError, match=r"hf:gated/tiny@main: cannot be fetched: .*\n.*starting again goes on from there"):
        locate(gated)
    cut.clear()
    assert (locate(gated).path / "tokenizer.json").read_bytes() == files["tokenizer.json"]


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("org/none", {}, "hf:org/none@main: there is no such model, or it is private and HF_TOKEN is not set"),
        ("gated/tiny", {}, "hf:gated/tiny@main: its owner lets only people in who accepted the terms"),
        ("org/tiny", {"model_revision": "v9"}, "hf:org/tiny@v9: has no revision 'v9'"),
        ("org/tiny", {"use_auth_token": True}, "use_auth_token: true, but no token is stored"),
    ],
)
def test_what_cannot_be_fetched(
    asked: list[str], name: str, values: Any, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ModelError, match=rf"model_name_or_path: .*{said}[^\n]*\nWays on: set HF_ENDPOINT .*ms:{name}"):
        load_tokenizer(model(name, **values))


def test_pickles_are_not_even_fetched(asked: list[str]) -> None:
    with pytest.raises(ModelError, match=r"holds no weights; expected model\.safetensors"):
        load_pretrained(model("org/pickled"))
    assert "pytorch_model.bin" not in fetched(asked)


def test_offline_with_and_without_the_cache(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    locate(model("org/tiny"))
    fetch.cache_clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    asked.clear()
    load_pretrained(model("org/tiny"))
    with pytest.raises(ModelError, match="hf:org/pickled@main: not in the cache, and HF_HUB_OFFLINE is set"):
        locate(model("org/pickled"))
    assert asked == []


def test_modelscope(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def snapshot_download(model_id: str, revision: str | None = None, cache_dir: str | None = None, **patterns: Any) -> str:
        calls.append((model_id, revision, cache_dir))
        assert not any(pattern.endswith((".py", ".bin")) for pattern in patterns["allow_patterns"])
        shutil.copytree(tiny_model, tmp_path / "ms", dirs_exist_ok=True)
        return str(tmp_path / "ms")

    module = types.ModuleType("modelscope")
    module.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modelscope", module)
    fetch.cache_clear()
    assert locate(model("ms:org/a", cache_dir="there")).name == str(tmp_path / "ms")
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    locate(model("org/b", model_revision="v2"))
    assert calls == [("org/a", None, "there"), ("org/b", "v2", None)]
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(ModelError, match=r'models of ModelScope need its client: pip install "tunesmith\[modelscope\]"'):
        locate(model("org/c"))
    fetch.cache_clear()

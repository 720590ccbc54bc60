"""Model files that are damaged, lie or could run code are refused by name before a weight is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tunesmith.errors import ModelError
from tunesmith.model.files import check_adapter_folder, check_model_folder, read_weight_headers
from tunesmith.model.safetensors_file import Stored, read_header
from tunesmith.model.source import resolve_base


def write(path: Path, header: Any, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, shape: Any = (2,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


def test_a_whole_file_is_read(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(3, 2, dtype=torch.bfloat16), "b": torch.zeros(0), "c": torch.zeros((), dtype=torch.int64)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    expected = {"a": Stored("BF16", (3, 2)), "b": Stored("F32", (0,)), "c": Stored("I64", ())}
    assert read_header(tmp_path / "x.safetensors") == expected


@pytest.mark.parametrize(
    ("header", "data", "said"),
    [
        ({"a": entry(0, 8)}, 7, "its tensors take 8 bytes, the file has 7"),
        ({"a": entry(0, 8)}, 9, "its tensors take 8 bytes, the file has 9"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "b overlaps the tensor before it"),
        ({"a": entry(0, 8), "b": entry(12, 20)}, 20, "b leaves a gap"),
        ({"a": entry(0, 8, (3,))}, 8, r"a: shape \[3\] of F32 takes 12 bytes, its offsets span 8"),
        ({"a": entry(0, 8, (2,), "F99")}, 8, "a: unknown dtype 'F99'"),
        ({"a": entry(8, 0, (-2,))}, 8, "are no counts"),
        ({"a": entry(0, 8, (1 << 62, 1 << 62))}, 8, "its offsets span 8"),
        ({"a": entry(0, 8, "22")}, 8, "are no counts"),
        ({"a": {"dtype": "F32"}}, 0, "a: expected dtype, shape and data_offsets"),
        (b'{"a": {}, "a": {}}', 0, "a name is given twice"),
        (b"[" * 100_000, 0, "not valid JSON"),
        (b"[]", 0, "not a JSON object"),
    ],
)
def test_a_header_that_lies(tmp_path: Path, header: Any, data: int, said: str) -> None:
    with pytest.raises(ModelError, match=rf"x\.safetensors: a damaged or cut-off safetensors file: .*{said}"):
        read_header(write(tmp_path / "x.safetensors", header, bytes(data)))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.9999])
def test_a_cut_off_file(tiny_model: Path, tmp_path: Path, share: float) -> None:
    data = (tiny_model / "model.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ModelError, match="damaged or cut-off"):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("start", "said"),
    [(b"version https://git-lfs", "git lfs pull"), (b"PK\x03\x04....", "zip archive"), (b"\x80\x04\x95...", "pickle")],
)
def test_another_kind_of_file_under_the_name(tmp_path: Path, start: bytes, said: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(start + bytes(50))
    with pytest.raises(ModelError, match=said):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}, "names 2.safetensors, which is not there"),
        ({"weight_map": {"z": "1.safetensors"}}, "says that z is in 1.safetensors, which does not hold it"),
        ({"weight_map": {"a": "../1.safetensors"}}, r"names '\.\./1\.safetensors', which leaves the folder; refused"),
        ({"weight_map": {"a": "/etc/1.safetensors"}}, "leaves the folder; refused"),
        ({"weight_map": {"a": "pytorch_model-1.bin"}}, "is no safetensors file; pickled weights can run code"),
        ({"weight_map": {"a": 1}}, "expected weight_map"),
        ({}, "expected weight_map"),
    ],
)
def test_an_index_that_does_not_fit_its_shards(tmp_path: Path, index: Any, said: str) -> None:
    write(tmp_path / "1.safetensors", {"a": entry(0, 8)}, bytes(8))
    (tmp_path / "i.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=rf"i\.json: .*{said}"):
        read_weight_headers(tmp_path, "none", "i.json")


def test_shards_are_read_together(tmp_path: Path) -> None:
    for number, name in enumerate("ab"):
        write(tmp_path / f"{number}.safetensors", {name: entry(0, 8)}, bytes(8))
    (tmp_path / "i.json").write_text(json.dumps({"weight_map": {"a": "0.safetensors", "b": "1.safetensors"}}))
    assert sorted(read_weight_headers(tmp_path, "none", "i.json")) == ["a", "b"]


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    write(tmp_path / "0.safetensors", {"a": entry(0, 8)}, bytes(8))
    write(tmp_path / "1.safetensors", {"a": entry(0, 8), "b": entry(8, 16)}, bytes(16))
    (tmp_path / "i.json").write_text(json.dumps({"weight_map": {"a": "0.safetensors", "b": "1.safetensors"}}))
    with pytest.raises(ModelError, match=r"says that a is in 0\.safetensors, and 1\.safetensors holds it too"):
        read_weight_headers(tmp_path, "none", "i.json")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "lama"}, "unknown model_type 'lama'; did you mean 'llama'"),
        ({"model_type": "qzx17"}, "unknown model_type 'qzx17'; a newer transformers may know it"),
        ({"model_type": None}, "has no model_type"),
        (
            {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C"}},
            "is not run; if you have read it, set trust_remote_code: true",
        ),
        ({"attn_implementation": "org/kernel"}, "attn_implementation 'org/kernel' would fetch and run code"),
        ({"text_config": {"_experts_implementation": {"": "a/b"}}}, "'a/b' would fetch and run code"),
        ({"transformers_weights": "pytorch_model.bin"}, "transformers_weights names a weight file of its own"),
    ],
)
def test_a_config_that_cannot_be_used(tiny_model: Path, tmp_path: Path, changes: Any, said: str) -> None:
    config = json.loads((tiny_model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ModelError, match=rf"config\.json: .*{said}"):
        check_model_folder(tmp_path, weights=False)


@pytest.mark.parametrize(("text", "said"), [("{", "not valid JSON"), ("[]", "expected a JSON object"), (None, "no such file")])
def test_a_config_that_cannot_be_read(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=rf"config\.json: {said}"):
        check_model_folder(tmp_path)


def test_an_adapter_may_not_name_a_module_to_import(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"megatron_config": {}, "megatron_core": "evil"}))
    with pytest.raises(ModelError, match="megatron_config would import a module"):
        check_adapter_folder(tmp_path)


def test_what_a_path_holds(tiny_model: Path, tmp_path: Path) -> None:
    assert resolve_base(tiny_model).kind == "model"
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(ModelError, match="the run has not finished; go on with resume_from_checkpoint=auto"):
        resolve_base(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    found = resolve_base(tmp_path)
    assert (found.kind, found.run, found.base) == ("adapter", True, "org/base")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="base_model_name_or_path does not say which model"):
        resolve_base(tmp_path)
    (tmp_path / "g").mkdir()
    (tmp_path / "g/a.gguf").touch()
    assert resolve_base(tmp_path / "g").path == tmp_path / "g/a.gguf"
    shutil.copy(tmp_path / "g/a.gguf", tmp_path / "g/b.gguf")
    with pytest.raises(ModelError, match=r"several GGUF files; give one of them: a\.gguf, b\.gguf"):
        resolve_base(tmp_path / "g")
    for name, said in (
        ("m.zip", "is an archive; unpack it"),
        ("m.bin", "is a pickle"),
        ("model.safetensors", "give its folder"),
    ):
        (tmp_path / name).touch()
        with pytest.raises(ModelError, match=said):
            resolve_base(tmp_path / name)

"""GGUF files: the converter is found or fetched, what it wrote is compared, and half of an export is never kept."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from tests.conftest import ROOT, tunesmith
from tests.export.conftest import hashes
from tests.export.test_export import ARCHITECTURES, adapter_for
from tunesmith.errors import ConfigError, ModelError, VerificationError
from tunesmith.export import converter
from tunesmith.export.gguf import Conversion, prepare
from tunesmith.export.sentencepiece import TOKENIZER_MODEL, prepends_space, sentencepiece_model, write_tokenizer_model
from tunesmith.model.gguf_restore import restore
from tunesmith.verify.gguf import TOLERANCE, differences, judge

STANDIN = f"""
import argparse, json, os, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from tests.gguf_writer import write_gguf

parser = argparse.ArgumentParser()
for name in ("--outfile", "--outtype", "--model-name", "model"):
    parser.add_argument(name)
asked = parser.parse_args()
model = Path(asked.model)
assert (model / "tokenizer.model").read_bytes()
assert os.environ["HF_HUB_OFFLINE"] == "1"
if asked.outtype == "f16":
    Path(asked.outfile).write_bytes(b"GGUF")
    raise SystemExit("no room left")
template = model / "chat_template.jinja"
write_gguf(model, Path(asked.outfile), template.read_text() if asked.outtype == "f32" else "another")
"""


@pytest.fixture
def standin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A converter of its own: writes with f32, fails half way with f16, writes another template with bf16."""
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    (folder / converter.SCRIPT).write_text(STANDIN, encoding="utf-8")
    monkeypatch.setattr(converter, "find_spec", lambda name: name)
    return folder


def test_what_is_written_is_compared_before_it_is_kept(shared: Path, tmp_path: Path, export_here: Any, standin: Path) -> None:
    adapter = adapter_for(shared / "models" / "stories260K", tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories260K")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    tokenizer.save_pretrained(adapter)
    options = {"dtype": "fp32", "gguf_converter": standin}
    with pytest.raises(ModelError, match=r"convert_hf_to_gguf\.py cannot convert the model: no room left"):
        export_here(adapter, gguf="f16", **options)
    with pytest.raises(VerificationError, match="not written: the GGUF file: its chat template is another"):
        export_here(adapter, gguf="bf16", **options)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "llama.cpp"}
    output, said = export_here(adapter, gguf="f32", ollama=True, **options)
    assert (output / "Modelfile").read_text(encoding="utf-8").startswith("FROM ./model.gguf\n")
    assert not (output / TOKENIZER_MODEL).exists()
    facts = json.loads((output / "export.json").read_text(encoding="utf-8"))
    assert facts["gguf"]["difference"]["max"] == 0
    assert facts["files"]["model.gguf"]["sha256"] == hashes(output)["model.gguf"]
    assert any(line.startswith("GGUF in f32, read back: greatest difference 0.00e+00") for line in said)
    assert "llama-cli -m model.gguf" in (output / "README.md").read_text(encoding="utf-8")


def test_what_is_missing_is_said_before_anything_is_done(
    trained: Any, tmp_path: Path, export_here: Any, standin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained()
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path / "home"))
    for options, words in (
        ({"gguf": "f16"}, "`tunesmith fetch llama.cpp` does"),
        ({"gguf": "f16", "gguf_converter": tmp_path}, r"--gguf-converter: no convert_hf_to_gguf\.py in"),
        ({"gguf_converter": standin}, "together with --gguf"),
        ({"gguf": "f16", "gguf_converter": standin, "adapter_only": True}, "leave out .*--gguf"),
    ):
        with pytest.raises(ConfigError, match=words):
            export_here(run, **options)
    base = tmp_path / "kind"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "olmo9"}', encoding="utf-8")
    with pytest.raises(ModelError, match=r"of the kind olmo9 cannot be read back.*mixtral"):
        prepare("f16", standin, base)
    monkeypatch.setattr(converter, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'tunesmith\[gguf\]'"):
        export_here(run, gguf="f16", gguf_converter=standin / converter.SCRIPT)
    (base / "config.json").write_text('{"auto_map": {"AutoConfig": "x.Y"}}', encoding="utf-8")
    with pytest.raises(ModelError, match="names Python code, which the converter would run"):
        Conversion(standin, "f16", False).write(base, "x", trusted=False)


def test_only_the_converter_is_taken_out_of_the_archive(tmp_path: Path) -> None:
    inside = str(converter._INSIDE)
    archive, target = tmp_path / "a.tar.gz", tmp_path / "made"
    with tarfile.open(archive, "w:gz") as tar:
        for name in ("convert_hf_to_gguf.py", "conversion/base.py", "../../../evil.py", "src/llama.cpp", "conversionx/a.py"):
            entry = tarfile.TarInfo(f"{inside}/{name}")
            entry.size = 3
            tar.addfile(entry, io.BytesIO(b"abc"))
        link = tarfile.TarInfo(f"{inside}/conversion/link.py")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    converter._extract(archive, target)
    assert set(hashes(tmp_path)) == {"a.tar.gz", "made/convert_hf_to_gguf.py", "made/conversion/base.py"}


def test_experts_and_norms_are_put_back(shared: Path, tmp_path: Path) -> None:
    """Written here as llama.cpp stores them; every tensor comes back bit-equal."""
    for name, arch in (("stories260K-mixtral", gguf.MODEL_ARCH.LLAMA), ("stories260K-gemma", gguf.MODEL_ARCH.GEMMA)):
        source = shared / "models" / name
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        weights = load_file(source / "model.safetensors")
        names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
        writer = gguf.GGUFWriter(tmp_path / f"{name}.gguf", gguf.MODEL_ARCH_NAMES[arch])
        stacked: dict[str, dict[int, np.ndarray]] = {}
        for key, value in weights.items():
            before, expert, after = key.partition(".experts.")
            number, _, rest = after.partition(".")
            if expert:
                stacked.setdefault(f"{before}.experts.{rest}", {})[int(number)] = value
                continue
            for part, count in (("q_proj", config["num_attention_heads"]), ("k_proj", config["num_key_value_heads"])):
                if part in key and arch == gguf.MODEL_ARCH.LLAMA:
                    value = value.reshape(count, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
            value = value + 1 if arch == gguf.MODEL_ARCH.GEMMA and "norm" in key else value
            if name.endswith("gemma") and key == "lm_head.weight":
                continue
            writer.add_tensor(names.get_name(key, (".weight",)), np.ascontiguousarray(value))
        for key, parts in stacked.items():
            writer.add_tensor(names.get_name(key, (".weight",)), np.stack([parts[i] for i in sorted(parts)]))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        restore(tmp_path / f"{name}.gguf", source, tmp_path / name)
        again = load_file(tmp_path / name / "model.safetensors")
        assert again.keys() == weights.keys()
        for key, value in weights.items():
            expected = (
                weights["model.embed_tokens.weight"] if arch == gguf.MODEL_ARCH.GEMMA and key == "lm_head.weight" else value
            )
            assert np.abs(again[key] - expected).max() <= (1e-6 if "norm" in key else 0), key


def test_what_differs_in_a_gguf_file_is_named(shared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories260K")
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    same = {"ggml.tokens": tokens, "ggml.eos_token_id": tokenizer.eos_token_id}
    assert differences(same, tokenizer) == []
    swapped = [*tokens[:300], "other", *tokens[301:]]
    assert "1 tokens are others; token 300 is 'other'" in differences({**same, "ggml.tokens": swapped}, tokenizer)[0]
    assert "token 500 is missing" in differences({**same, "ggml.tokens": tokens[:500]}, tokenizer)[0]
    assert "ends at token 0" in differences({**same, "ggml.eos_token_id": 0}, tokenizer)[0]
    assert "template" in differences({**same, "chat_template": "x"}, tokenizer)[0]
    found = {"export": {"max": 1.0, "relative": 3e-3}, "agree": 4, "prompts": 4, "missing": []}
    assert [bool(judge(found, kind, []).problems) for kind in TOLERANCE] == [True, True, False, False]
    assert not judge(found, "f16", [], tolerance=1e-2).problems
    assert judge({**found, "missing": ["x"]}, "q8_0", []).problems


def test_a_tokenizer_model_is_made_of_what_it_was_made_from(shared: Path, tiny_model: Path, tmp_path: Path) -> None:
    made = json.loads((shared / "models/stories260K/tokenizer.json").read_text(encoding="utf-8"))
    content = sentencepiece_model(made)
    assert content is not None
    assert b"\x0a\x03<s>" in content
    assert prepends_space(made)
    assert not prepends_space({"normalizer": None, "pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "never"}})
    assert sentencepiece_model(json.loads((tiny_model / "tokenizer.json").read_text(encoding="utf-8"))) is None
    shutil.copy(shared / "models/stories260K/tokenizer.json", tmp_path)
    (tmp_path / TOKENIZER_MODEL).write_bytes(b"mine")
    assert write_tokenizer_model(tmp_path) is None
    assert (tmp_path / TOKENIZER_MODEL).read_bytes() == b"mine"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(
    importlib.util.find_spec("sentencepiece") is None, reason="needs sentencepiece (pip install 'tunesmith[gguf]')"
)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_through_llama_cpp(shared: Path, tmp_path: Path, name: str) -> None:
    import sentencepiece

    tunesmith("fetch", "llama.cpp")
    base = shared / "models" / name
    adapter = adapter_for(base, tmp_path / "adapter", target_modules=["o_proj"])
    done = tunesmith("export", adapter, "--output", tmp_path / "out", "--gguf", "f32", "--ollama", check=False)
    if name.endswith("gemma"):  # its head is not its embedding, and llama.cpp has no other for this kind
        assert done.returncode == 1
        assert "the GGUF file differs from the export by 8." in done.stderr
        assert not (tmp_path / "out").exists()
        return
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out/export.json").read_text(encoding="utf-8"))["gguf"]
    assert found["difference"]["max"] == 0
    write_tokenizer_model(tmp_path / "out")
    pieces = sentencepiece.SentencePieceProcessor(str(tmp_path / "out" / TOKENIZER_MODEL))
    tokenizer = AutoTokenizer.from_pretrained(shared / "models/stories260K")
    for text in ("Once upon a time", "  two  spaces\n\nlines 12", "你好 — é"):
        assert pieces.encode(text) == tokenizer(text, add_special_tokens=False)["input_ids"]

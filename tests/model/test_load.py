"""Models load from every source, say what they should, and fit their tokenizers."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.conftest import SHARED, make_tokenizer, tunesmith
from tests.gguf_writer import write_gguf
from tunesmith.config.arguments import ModelArguments
from tunesmith.errors import ModelError
from tunesmith.model.files import ADAPTER_WEIGHTS
from tunesmith.model.load import load_pretrained
from tunesmith.model.precision import resolve_dtype
from tunesmith.model.source import locate
from tunesmith.model.tokenizer import added_token_ids, load_tokenizer

CPU = torch.device("cpu")
TOKENS = {"add_tokens": "<a>,<b>", "new_special_tokens": "<c>"}
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{{ eos_token if m['role'] == 'assistant' else '' }}{% endfor %}"
ARCHITECTURES = ["", "-mistral", "-qwen2", "-phi3", "-gemma", "-mixtral"]


def args(path: object, **values: Any) -> ModelArguments:
    return ModelArguments(model_name_or_path=str(path), compute_dtype="fp32", **values)


def greedy(model: Any, tokenizer: Any, tokens: int) -> str:
    # the library's own loop over the model, so that nothing of ours but the loading is in between
    output = model.generate(torch.tensor([[tokenizer.bos_token_id]]), do_sample=False, max_new_tokens=tokens, pad_token_id=0)
    return str(tokenizer.decode(output[0], skip_special_tokens=True)).strip()


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_golden_text(shared: Path, kind: str) -> None:
    golden = (shared / "models/golden_greedy.txt").read_text().strip()
    model, tokenizer = load_pretrained(args(shared / f"models/stories260K{kind}"))
    assert model.dtype == torch.float32
    text = greedy(model, tokenizer, 60)
    assert len(text) > 60
    assert golden.startswith(text)


def test_experts_whose_rows_are_no_whole_16_bytes_run_in_16_bits(shared: Path) -> None:
    """172 numbers of two bytes: torch's grouped product, transformers' choice, stops at them."""
    ids = torch.arange(5, 25)[None]
    logits = []
    for dtype in ("bf16", "fp32"):
        path = shared / "models/stories260K-mixtral"
        model, _ = load_pretrained(ModelArguments(model_name_or_path=str(path), compute_dtype=dtype))
        logits.append(model(ids).logits.detach().float())
    assert (logits[0] - logits[1]).abs().mean() < 0.05 * logits[1].abs().mean()


def test_dtypes(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for fast, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("tunesmith.model.precision.multiplies_bf16", lambda device, fast=fast: fast)
        assert resolve_dtype("auto", CPU) == expected
        model, _ = load_pretrained(ModelArguments(model_name_or_path=str(tiny_model)))
        assert {p.dtype for p in model.parameters()} == {expected}
    assert load_pretrained(args(tiny_model), torch.float16)[0].dtype == torch.float16


@pytest.mark.parametrize(("value", "found"), [("auto", "auto"), ("disabled", "eager"), ("sdpa", "sdpa")])
def test_flash_attn_means_attn_implementation(settings: Any, write_config: Any, value: str, found: str) -> None:
    from tunesmith.config.load import load_config

    assert load_config(write_config({**settings, "flash_attn": value}))[0].model.attn_implementation == found
    done = tunesmith("check", write_config({**settings, "flash_attn": "fa2"}), check=False)
    assert "flash_attn: fa2 is not used here; attn_implementation: auto computes rows end to end" in done.stdout
    done = tunesmith("check", write_config({**settings, "flash_attn": value, "attn_implementation": "sdpa"}), check=False)
    assert "says the same as attn_implementation" in done.stdout


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings")
@pytest.mark.parametrize("layer", ["embed_tokens", "lm_head"])
def test_an_adapter_of_one_end_is_merged_into_that_end_alone(shared: Path, tmp_path: Path, layer: str) -> None:
    base = AutoModelForCausalLM.from_pretrained(shared / "models" / "stories260K", dtype=torch.float32).eval()
    tuned = get_peft_model(base, LoraConfig(r=4, target_modules=[layer]))
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(
                0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * parameter.requires_grad
            )
        tuned.save_pretrained(tmp_path, save_embedding_layers=False)
        ids = torch.arange(3, 43)[None]
        torch.testing.assert_close(load_pretrained(args(tmp_path))[0](ids).logits, tuned(ids).logits, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"intermediate_size": 96}, r"mlp\..*_proj.weight is stored with the shape .*128.*, and config.json makes it .*96"),
        ({"num_attention_heads": 3}, "cannot load the configuration .*not a multiple of the number of attention heads"),
        ({"vocab_size": "400"}, "cannot load the configuration .*expected int, got str"),
    ],
)
def test_a_configuration_of_another_model(tiny_model: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "m")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ModelError, match=said):
        load_pretrained(args(model))


def test_an_end_token_is_found(tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "m")
    config = json.loads((model / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    with caplog.at_level(logging.WARNING):
        loaded, tokenizer = load_pretrained(args(model))
    assert tokenizer.eos_token == "<|endoftext|>"
    assert "generation_config.json does: <|endoftext|>" in caplog.text
    for name in ("generation_config.json", "config.json"):
        values = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps({**values, "eos_token_id": None, "pad_token_id": -1}))
    loaded, tokenizer = load_pretrained(args(model))
    assert tokenizer.eos_token == "<|im_end|>"
    assert loaded.generation_config.eos_token_id == loaded.config.eos_token_id == tokenizer.eos_token_id
    assert loaded.config.pad_token_id == loaded.generation_config.pad_token_id == tokenizer.pad_token_id


def test_all_ends_count_and_an_end_that_pads_is_learned(tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "m")
    make_tokenizer(model, pad_is_eos=True)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "pad_token_id": 2, "eos_token_id": 1}))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1]}))
    loaded, tokenizer = load_pretrained(args(model))
    assert loaded.generation_config.eos_token_id == [0, 1, tokenizer.eos_token_id]
    loaded(torch.tensor([[tokenizer.eos_token_id, 5]])).logits.sum().backward()
    assert loaded.get_input_embeddings().weight.grad[tokenizer.eos_token_id].norm() > 0


# ---- vocabulary


def untied(folder: Path, rows: int, tied: bool = False) -> Path:
    tokenizer = make_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=rows, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, tie_word_embeddings=tied, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("rows", "after"), [(349, 352), (384, 384), (320 + 30, 352)])
def test_new_rows_are_the_mean_and_none_are_lost(tmp_path: Path, rows: int, after: int) -> None:
    folder = untied(tmp_path, rows)
    values = {"add_tokens": "<a>,<b>", "add_special_tokens": "<c>"}
    before, plain = load_pretrained(args(folder))
    model, tokenizer = load_pretrained(args(folder, **values))
    assert len(tokenizer) == len(plain) + 3
    assert added_token_ids(args(folder, **values), tokenizer) == [349, 350, 351]
    assert model.config.vocab_size == after
    for old, new in (
        (before.get_input_embeddings().weight, model.get_input_embeddings().weight),
        (before.get_output_embeddings().weight, model.get_output_embeddings().weight),
    ):
        assert new.shape[0] == after
        assert torch.equal(new[:349], old[:349])
        torch.testing.assert_close(new[349:352], old[:349].mean(0).expand(3, -1))
        assert torch.equal(new[352:], old[352:])
    assert tokenizer.decode(tokenizer("x<a><c>")["input_ids"], skip_special_tokens=True) == "x<a>"


def test_a_multiple_of_64_stays_one(tmp_path: Path) -> None:
    folder = untied(tmp_path, 384)
    many = ",".join(f"<t{number}>" for number in range(40))
    model = load_pretrained(args(folder, add_tokens=many))[0]
    assert model.config.vocab_size == 448
    for rows in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        torch.testing.assert_close(rows[389:], rows[:349].mean(0).expand(59, -1))  # none is drawn at random


def test_a_tokenizer_that_is_too_large(tmp_path: Path) -> None:
    folder = untied(tmp_path, 300)
    with pytest.raises(ModelError, match=r"the tokenizer has 349 tokens, vocab_size in config\.json is 300"):
        load_tokenizer(args(folder))
    assert load_pretrained(args(folder, resize_vocab=True))[0].config.vocab_size == 349


PLAIN = """
import sys, json, torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
for run in sys.argv[1:]:
    model = AutoPeftModelForCausalLM.from_pretrained(run).eval()
    ids = AutoTokenizer.from_pretrained(run)("<a>cat<b><c>")["input_ids"]
    merged = model.merge_and_unload()
    print(json.dumps({"ids": ids, "logits": merged(torch.tensor([ids])).logits[0, :, :352].tolist(),
                      "rows": merged.get_input_embeddings().weight[349:352].tolist(),
                      "head": merged.get_output_embeddings().weight[349:352].tolist()}))
"""


def test_added_tokens_in_plain_transformers_and_peft(tmp_path: Path, settings: Any, write_config: Any, dataset: Path) -> None:
    (dataset / "rows.jsonl").write_text('{"instruction": "<a> the", "output": "<b> cat <c>"}\n' * 8)
    runs = {tied: tmp_path / f"run-{tied}" for tied in (True, False)}
    for tied, run in runs.items():
        folder = untied(tmp_path / f"base-{tied}", 349, tied)
        settings.update(
            model_name_or_path=str(folder), lr_scheduler_type="constant", num_train_epochs=2, save_steps=2, **TOKENS
        )
        config = write_config(settings)
        tunesmith("train", config, f"output_dir={run}")
        broken = tmp_path / f"broken-{tied}"
        tunesmith("train", config, f"output_dir={broken}", "max_steps=2")
        tunesmith("train", config, f"output_dir={broken}", "resume_from_checkpoint=auto")
        assert (run / ADAPTER_WEIGHTS).read_bytes() == (broken / ADAPTER_WEIGHTS).read_bytes()

    done = subprocess.run([sys.executable, "-c", PLAIN, *map(str, runs.values())], capture_output=True, text=True, check=True)
    assert "newly initialized" not in done.stderr
    for (tied, run), line in zip(runs.items(), done.stdout.splitlines(), strict=True):
        state = load_file(run / ADAPTER_WEIGHTS)
        rows = {name: tensor for name, tensor in state.items() if "trainable_tokens" in name}
        assert [tuple(tensor.shape) for tensor in rows.values()] == [(3, 32)] * (1 if tied else 2)
        plain = json.loads(line)
        assert (plain["ids"][0], plain["ids"][-1]) == (349, 351)
        embedding = next(tensor for name, tensor in rows.items() if "embed_tokens" in name)
        head = embedding if tied else next(tensor for name, tensor in rows.items() if "lm_head" in name)
        assert torch.equal(torch.tensor(plain["rows"]), embedding)
        assert torch.equal(torch.tensor(plain["head"]), head)
        assert not torch.equal(head[1], head[2])  # all began as the mean; <b> was answered, <c> is special and was not
        ours, tokenizer = load_pretrained(args(run))  # the adapter merged into its base
        logits = ours(torch.tensor([plain["ids"]])).logits[0, :, :352]
        torch.testing.assert_close(logits, torch.tensor(plain["logits"]), atol=1e-5, rtol=1e-4)
        assert len(tokenizer) == 352


def test_going_on_from_an_adapter_with_added_tokens(tmp_path: Path, settings: Any, write_config: Any, dataset: Path) -> None:
    (dataset / "rows.jsonl").write_text('{"instruction": "<a> the", "output": "<b> cat"}\n' * 8)
    settings.update(model_name_or_path=str(untied(tmp_path / "base", 349)), max_steps=2, add_tokens="<a>,<b>")
    run, config = Path(settings["output_dir"]), write_config(settings)
    tunesmith("train", config)
    further = [f"checkpoint_dir={run}", f"output_dir={run}-2"]
    tunesmith("train", config, *further)
    first, second = (load_file(folder / ADAPTER_WEIGHTS) for folder in (run, Path(f"{run}-2")))
    rows = [name for name in first if "trainable_tokens" in name]
    assert len(rows) == 2
    assert all((first[name] - second[name]).norm() > 0 for name in rows)
    refused = [
        (["add_tokens=<a>", "output_dir=x"], "has rows for 2 added tokens, the settings add 1"),
        (["resume_lora_training=false"], "cannot be joined with another"),
    ]
    for changes, said in refused:
        done = tunesmith("train", config, *further, *changes, "overwrite_output_dir=true", check=False)
        assert said in done.stderr, done
    done = tunesmith("train", config, f"output_dir={run}-3", "pissa_init=true", check=False)
    assert "cannot be saved with what pissa_init begins" in done.stderr


# ---- results of runs


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_result_of_a_run_is_a_model(settings: Any, write_config: Any, kind: str) -> None:
    config = write_config({**settings, "finetuning_type": kind, "max_steps": 2})
    tunesmith("train", config)
    run = Path(settings["output_dir"])
    first = tunesmith("chat", run, "--prompt", "the cat", "do_sample=false", "max_new_tokens=8").stdout
    model, tokenizer = load_pretrained(args(run))
    base, _ = load_pretrained(args(settings["model_name_or_path"]))
    ids = torch.tensor([tokenizer("the cat sat")["input_ids"]])
    assert (model(ids).logits - base(ids).logits).abs().max() > 1e-3
    done = tunesmith("train", config, f"model_name_or_path={run}", f"output_dir={run}-2", check=False)
    if kind == "full":
        assert done.returncode == 0
        return
    assert "is an adapter, and one on top of it would have a base that exists nowhere" in done.stderr
    tunesmith(
        "train", config, f"model_name_or_path={run}", f"output_dir={run}-2", "finetuning_type=full", "learning_rate=1e-12"
    )
    again = tunesmith("chat", f"{run}-2", "--prompt", "the cat", "do_sample=false", "max_new_tokens=8").stdout
    assert again == first


# ---- GGUF


@pytest.fixture
def story(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path / "home"))
    write_gguf(shared / "models/stories260K", tmp_path / "story.gguf", TEMPLATE)
    return tmp_path / "story.gguf"


def test_a_gguf_file(story: Path, shared: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(args(story))
    assert not list((tmp_path / "home/models").glob("*/model.safetensors"))  # no weights for it
    model, tokenizer = load_pretrained(args(story.parent))  # a folder with one file
    original = AutoTokenizer.from_pretrained(shared / "models/stories260K")
    for text in ("Once upon a time", 'She said, "No!"  42', "你好"):
        assert tokenizer(text)["input_ids"] == original(text)["input_ids"]
    assert tokenizer.chat_template == TEMPLATE
    assert (shared / "models/golden_greedy.txt").read_text().startswith(greedy(model, original, 60))
    theirs = AutoModelForCausalLM.from_pretrained(shared / "models/stories260K").state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items())
    folder = locate(args(story)).path
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    load_pretrained(args(story))
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp  # converted once


def test_a_gguf_file_that_is_not_whole(story: Path) -> None:
    data = story.read_bytes()
    for part, said in (
        (data[:-5000], "damaged or cut-off GGUF"),
        (data[:2000], "damaged or cut-off GGUF"),
        (b"PK" + data, "no GGUF"),
    ):
        story.write_bytes(part)
        with pytest.raises(ModelError, match=rf"story\.gguf: .*{said}"):
            load_tokenizer(args(story))


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data folder")
def test_a_gguf_file_is_trained_and_answers(story: Path, settings: Any, write_config: Any) -> None:
    settings.update(model_name_or_path=str(story), max_steps=1)
    tunesmith("train", write_config(settings))
    base = json.loads((Path(settings["output_dir"]) / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert AutoModelForCausalLM.from_pretrained(base).config.model_type == "llama"  # plain transformers load it
    assert tunesmith("chat", settings["output_dir"], "--prompt", "Once", "max_new_tokens=4").stdout

"""What is exported answers as base and adapter do, and nothing that was there before is changed."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.conftest import tunesmith
from tests.export.conftest import hashes
from tunesmith.config.arguments import ModelArguments
from tunesmith.errors import CheckpointError, ConfigError, ModelError, VerificationError
from tunesmith.export import place
from tunesmith.model.heads import ValueHead, save_value_head
from tunesmith.model.reward import ModelScorer, load_reward_model
from tunesmith.train.finished import open_finished

ARCHITECTURES = ("stories260K", "stories260K-mistral", "stories260K-qwen2", "stories260K-phi3", "stories260K-gemma", "stories260K-mixtral")  # fmt: skip
_IDS = torch.arange(3, 60).view(3, 19)


def proof_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "export.json").read_text(encoding="utf-8"))["proof"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_e1_every_architecture(shared: Path, trained: Any, export_here: Any, name: str) -> None:
    base = shared / "models" / name
    run = trained(model_name_or_path=str(base), template="chatml", lora_target="all")
    before = hashes(run), hashes(base)
    output, said = export_here(run)
    proof = proof_of(output)
    assert 0 < proof["merged"]["max"] <= 1e-4
    assert proof["export"]["max"] <= 1e-4
    assert proof["agree"] == proof["prompts"] == 4
    assert any("greatest difference" in line for line in said)
    assert (hashes(run), hashes(base)) == before
    foreign = name.endswith("qwen2")  # a kind for which AutoTokenizer goes by the model, and this tokenizer is another's
    assert any("plain AutoTokenizer gives other tokens" in line for line in said) == foreign
    card = (output / "README.md").read_text(encoding="utf-8")
    assert ('PreTrainedTokenizerFast.from_pretrained(".")' in card) == foreign
    weights = load_file(output / "model.safetensors")
    tied = json.loads((base / "config.json").read_text(encoding="utf-8"))["tie_word_embeddings"]
    assert ("lm_head.weight" in weights) == (not tied)
    changed = [key for key, tensor in load_file(base / "model.safetensors").items() if not torch.equal(tensor, weights[key])]
    assert changed, "nothing was merged"


def adapter_for(base: Path, folder: Path, tokens: int = 0, **options: Any) -> Path:
    """An adapter made with PEFT alone, every trained number moved."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if tokens:
        model.resize_token_embeddings(model.config.vocab_size + tokens)
    tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **{"target_modules": ["q_proj"], **options}))
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    if tokens:
        model.get_input_embeddings().weight.data[-tokens:] += 0.1
    tuned.save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings", "ignore:Setting .save_embedding_layers")
@pytest.mark.parametrize(
    ("options", "tied"),
    [
        ({}, True),
        ({"use_dora": True}, True),
        ({"target_modules": ["q_proj", "embed_tokens"]}, False),
        ({"target_modules": ["q_proj", "lm_head"]}, False),
        ({"modules_to_save": ["lm_head"]}, False),
        ({"modules_to_save": ["embed_tokens"]}, False),
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
    ],
    ids=["plain", "dora", "lora-embedding", "lora-head", "head", "embedding", "both"],
)
def test_tied_heads_stay_tied_unless_training_parted_them(
    shared: Path, tmp_path: Path, export_here: Any, options: dict[str, Any], tied: bool
) -> None:
    adapter = adapter_for(shared / "models" / "stories260K", tmp_path / "adapter", **options)
    output, said = export_here(adapter, dtype="fp32")
    assert proof_of(output)["export"]["max"] <= 1e-4
    assert ("lm_head.weight" in load_file(output / "model.safetensors")) == (not tied)
    assert json.loads((output / "config.json").read_text(encoding="utf-8"))["tie_word_embeddings"] == tied
    assert any("tie_word_embeddings is false" in line for line in said) == (not tied)


@pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers`")
@pytest.mark.parametrize("adapter_only", [False, True], ids=["merged", "adapter"])
def test_e2_added_tokens_arrive_bit_equal(tiny_model: Path, tmp_path: Path, export_here: Any, adapter_only: bool) -> None:
    adapter = adapter_for(tiny_model, tmp_path / "adapter", tokens=3)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert tokenizer.add_tokens(["<one>", "<two>", "<three>"]) == 3
    tokenizer.save_pretrained(adapter)
    output, _ = export_here(adapter, base=str(tiny_model), adapter_only=adapter_only, dtype="fp32")
    rows = next(t for key, t in load_file(adapter / "adapter_model.safetensors").items() if key.endswith("embed_tokens.weight"))
    if adapter_only:
        base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        base.resize_token_embeddings(len(tokenizer))
        again = PeftModel.from_pretrained(base, output).get_input_embeddings().weight
        assert (output / "adapter_model.safetensors").stat().st_size == (adapter / "adapter_model.safetensors").stat().st_size
    else:
        again, info = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        again = again.get_input_embeddings().weight
    assert torch.equal(again[-3:], rows[-3:])
    loaded = AutoTokenizer.from_pretrained(output)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.chat_template == tokenizer.chat_template
    assert GenerationConfig.from_pretrained(output).eos_token_id == GenerationConfig.from_pretrained(tiny_model).eos_token_id


@pytest.mark.parametrize("options", [{}, {"adapter_only": True}], ids=["merged", "adapter"])
@pytest.mark.parametrize("name", ["stories260K", "stories260K-gemma"], ids=["tied", "untied"])
def test_e2_tokens_that_a_run_added(shared: Path, trained: Any, export_here: Any, name: str, options: dict[str, Any]) -> None:
    run = trained(model_name_or_path=str(shared / "models" / name), template="chatml", add_tokens=["<one>", "<two>", "<three>"])
    output, _ = export_here(run, **options)
    assert proof_of(output)["export"]["max"] <= 1e-4
    rows = {key: t for key, t in load_file(run / "adapter_model.safetensors").items() if "token_adapter" in key}
    assert len(rows) == (1 if name == "stories260K" else 2)
    weights = load_file(output / ("adapter_model.safetensors" if options else "model.safetensors"))
    for key, learned in rows.items():
        layer = "lm_head" if "lm_head" in key else "model.embed_tokens"
        again = weights[key] if options else weights[f"{layer}.weight"][512:515]
        assert torch.equal(again, learned)
    assert len(AutoTokenizer.from_pretrained(output)) >= 515


def test_a_run_does_not_say_that_code_may_run(trained: Any) -> None:
    run = trained()
    settings = (run / "config.yaml").read_text(encoding="utf-8").replace("trust_remote_code: false", "trust_remote_code: true")
    (run / "config.yaml").write_text(settings, encoding="utf-8")
    assert "trust_remote_code: true" in settings
    base = open_finished(run).base
    assert base is not None
    assert base.trust_remote_code is False


def test_generation_stops_at_the_end_of_a_turn(shared: Path, trained: Any, export_here: Any, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(shared / "models" / "stories260K", base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<unk>' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"  # fmt: skip
    tokenizer.save_pretrained(base)
    run = trained(model_name_or_path=str(base))
    assert GenerationConfig.from_pretrained(run).eos_token_id == [2, 0]
    for option in (False, True):
        output, _ = export_here(run, tmp_path / f"out-{option}", adapter_only=option)
        assert GenerationConfig.from_pretrained(output).eos_token_id == [2, 0]


@pytest.mark.parametrize("kind", ["full", "freeze"])
def test_trained_weights_are_cast_and_cut_into_files(trained: Any, export_here: Any, kind: str) -> None:
    run = trained(finetuning_type=kind, learning_rate=1e-3, **({"num_layer_trainable": 1} if kind == "freeze" else {}))
    output, said = export_here(run, dtype="bf16", max_shard_size="100KB")
    assert len(list(output.glob("model-*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.dtype == torch.bfloat16
    original = AutoModelForCausalLM.from_pretrained(run, dtype=torch.float32).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, original[name].to(torch.bfloat16)), name
    proof = proof_of(output)
    assert proof["merged"] is None
    assert 1e-5 < proof["export"]["relative"] < 0.02
    assert any("cast to bf16" in line for line in said)
    with pytest.raises(ConfigError, match="whole model"):
        export_here(run, adapter_only=True, overwrite=True)


def test_an_adapter_on_top_of_trained_weights(
    settings: Any, trained: Any, tiny_model: Path, tmp_path: Path, export_here: Any
) -> None:
    first = trained(
        finetuning_type="freeze", num_layer_trainable=1, learning_rate=1e-2, output_dir=str(tmp_path / "first"), save_steps=1
    )
    checkpoint = first / "checkpoint-1"
    del settings["num_layer_trainable"]
    run = trained(checkpoint_dir=str(checkpoint), finetuning_type="lora", output_dir=str(tmp_path / "second"))
    output, _ = export_here(run)
    proof = proof_of(output)
    assert proof["merged"]["max"] <= 1e-4
    assert proof["export"]["max"] <= 1e-4
    weights, original = (load_file(folder / "model.safetensors") for folder in (output, tiny_model))
    norm = "model.layers.1.input_layernorm.weight"  # trained by the first, and not touched by the adapter
    assert torch.equal(weights[norm], load_file(checkpoint / "trainable.safetensors")[norm])
    assert not torch.equal(weights[norm], original[norm])


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("named", ["safetensors", "bin"])
def test_m1_pickles_of_a_run_are_refused(trained: Any, tmp_path: Path, export_here: Any, kind: str, named: str) -> None:
    run, canary = trained(finetuning_type=kind), tmp_path / "ran"
    stem = "adapter_model" if kind == "lora" else "model"
    (run / f"{stem}.safetensors").unlink()
    name = f"{stem}.safetensors" if named == "safetensors" else f"{stem if kind == 'lora' else 'pytorch_model'}.bin"
    (run / name).write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(ModelError, match=f"{stem}|pytorch_model|safetensors"):
        export_here(run)
    assert not canary.exists()
    assert not (tmp_path / "out").exists()


def test_auto_is_the_dtype_of_the_base(trained: Any, tiny_model: Path, tmp_path: Path, export_here: Any) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    AutoModelForCausalLM.from_pretrained(tiny_model).to(torch.bfloat16).save_pretrained(base)
    output, said = export_here(trained(model_name_or_path=str(base)))
    assert AutoModelForCausalLM.from_pretrained(output).dtype == torch.bfloat16
    assert proof_of(output)["merged"]["max"] <= 1e-4 < proof_of(output)["export"]["max"]
    assert len([line for line in said if "fp32" in line or "bf16" in line]) == 2


def test_adapter_only_is_the_adapter(trained: Any, tiny_model: Path, export_here: Any) -> None:
    run = trained()
    output, _ = export_here(run, adapter_only=True)
    for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (output / name).read_bytes() == (run / name).read_bytes(), name
    assert not (output / "model.safetensors").exists()
    assert proof_of(output)["export"]["max"] == 0
    card = (output / "README.md").read_text(encoding="utf-8")
    assert "AutoPeftModelForCausalLM" in card


@pytest.mark.filterwarnings("ignore:bitsandbytes")
def test_a_quantised_run_is_merged_into_the_base_it_names(shared: Path, trained: Any, export_here: Any) -> None:
    """Layers of this model have widths that are no multiple of 32."""
    pytest.importorskip("bitsandbytes")
    base = str(shared / "models" / "stories260K")
    output, said = export_here(trained(quantization_bit=4, model_name_or_path=base, template="chatml"))
    proof = proof_of(output)
    assert proof["export"]["max"] <= 1e-4
    assert proof["trained_on"]["relative"] > 1e-3
    assert any("trained on the base in 4 bits" in line for line in said)
    assert any("unquantised one differs" in line for line in said)
    assert load_file(output / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].dtype == torch.float32


def test_e1_a_quantised_base_is_refused(trained: Any, tiny_model: Path, tmp_path: Path, export_here: Any) -> None:
    base = tmp_path / "quantised"
    shutil.copytree(tiny_model, base)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    run = trained()
    with pytest.raises(ModelError, match=r"quantised \(bitsandbytes\).*rounded.*--base"):
        export_here(run, base=str(base))
    assert not (tmp_path / "out").exists()


def test_the_card_tells_what_the_run_was(trained: Any, tiny_model: Path, tmp_path: Path, export_here: Any) -> None:
    base = tmp_path / "licensed"
    shutil.copytree(tiny_model, base)
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# base\n", encoding="utf-8")
    run = trained(
        model_name_or_path=str(base),
        plot_loss=True,
        sample_prompts=["a | b"],
        sample_max_new_tokens=2,
        lora_rank=4,
        logging_steps=1,
    )
    output, said = export_here(run)
    card = (output / "README.md").read_text(encoding="utf-8")
    for text in ("license: apache-2.0", "`licensed` with the trained adapter", "`rows`: 22 of 22 rows", "| `lora_rank` | 4 |",
                 "![loss](training_loss.png)", r"| a \| b |", said[0]):  # fmt: skip
        assert text in card, text
    assert str(tmp_path) not in card
    assert (output / "training_loss.png").read_bytes() == (run / "training_loss.png").read_bytes()
    manifest = json.loads((output / "export.json").read_text(encoding="utf-8"))
    assert {name: facts["sha256"] for name, facts in manifest["files"].items()} == {
        name: digest for name, digest in hashes(output).items() if name != "export.json"
    }


def test_only_what_an_export_made_is_replaced(trained: Any, tmp_path: Path, export_here: Any) -> None:
    run = trained()
    output, _ = export_here(run, max_shard_size="100KB")
    with pytest.raises(ConfigError, match=r"an earlier export.*--overwrite"):
        export_here(run)
    (output / "notes.txt").write_text("mine")
    export_here(run, overwrite=True)
    assert (output / "notes.txt").read_text() == "mine"
    assert (output / "model.safetensors").is_file()
    assert not list(output.glob("model-0*"))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="files that no export made"):
        export_here(run, mine)
    with pytest.raises(ConfigError, match=r"config\.json was not made by an export"):
        export_here(run, mine, overwrite=True)
    assert [path.name for path in mine.iterdir()] == ["config.json"]
    for source in (run, run.parent):
        with pytest.raises(ConfigError, match="holds what is exported"):
            export_here(run, source, overwrite=True)
    assert not list(tmp_path.glob(".*.partial"))


def test_an_export_that_answers_otherwise_is_not_kept(trained: Any, tmp_path: Path, export_here: Any) -> None:
    run = trained()
    output, _ = export_here(run)
    before = hashes(output)
    with pytest.raises(VerificationError, match="tolerance 0"):
        export_here(run, tolerance=0.0, overwrite=True)
    assert hashes(output) == before
    with pytest.raises(VerificationError, match="differs from base and adapter"):
        export_here(run, tmp_path / "other", dtype="bf16", tolerance=1e-9)
    assert not (tmp_path / "other").exists()
    assert not list(tmp_path.glob(".*.partial"))


def test_numbers_that_do_not_fit_and_a_full_disk(
    trained: Any, tmp_path: Path, export_here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained()
    weights = load_file(run / "adapter_model.safetensors")
    large = {
        key: tensor * (1e6 if "lora_B" in key else 1.0) + (1e6 if "lora_B" in key else 0) for key, tensor in weights.items()
    }
    save_file(large, run / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="float16 cannot hold; use --dtype bf16"):
        export_here(run, dtype="fp16")
    save_file(weights, run / "adapter_model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(place.shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    with pytest.raises(ConfigError, match=r"needs 0\.1 GB, the disk has 0\.0 GB free"):
        export_here(run)
    assert not (tmp_path / "out").exists()


def test_m1_what_is_no_result_is_refused(trained: Any, tmp_path: Path, export_here: Any) -> None:
    with pytest.raises(CheckpointError, match="neither a run folder"):
        export_here(tmp_path)
    run = trained()
    for options, words in (
        ({"max_shard_size": "5 cows"}, "no size"),
        ({"push": "../x"}, "ORG/NAME"),
        ({"push": "one"}, "ORG/NAME"),
        ({"adapter_only": True, "ollama": True}, "leave out"),
    ):
        with pytest.raises(ConfigError, match=words):
            export_here(run, **options)
    (run / "adapter_model.safetensors").rename(run / "adapter_model.bin")
    with pytest.raises(ModelError, match="can run code"):
        export_here(run)
    (run / "train_results.json").unlink()
    with pytest.raises(CheckpointError, match="has not finished"):
        export_here(run)
    done = tunesmith("export", run, "--output", tmp_path / "x", "--public", check=False)
    assert done.returncode == 2
    assert "--push ORG/NAME" in done.stderr


@pytest.mark.parametrize("adapter_only", [False, True])
def test_a_value_head_goes_along(trained: Any, tiny_model: Path, export_here: Any, adapter_only: bool) -> None:
    run = trained()
    head = ValueHead(64)
    torch.nn.init.normal_(head.summary.weight, generator=torch.Generator().manual_seed(0))
    save_value_head(head, run)

    def scores(folder: Path, kind: Any) -> torch.Tensor:
        values = {"model_name_or_path": str(tiny_model), "compute_dtype": "fp32"}
        scorer = load_reward_model(ModelArguments(**values, reward_model=str(folder), reward_model_type=kind))  # type: ignore[arg-type]
        assert isinstance(scorer, ModelScorer)
        return scorer.row_scores([np.array([5, 6, 7]), np.array([9, 8])])

    output, said = export_here(run, adapter_only=adapter_only)
    assert any("value_head.safetensors goes along" in line for line in said)
    with pytest.raises(ConfigError, match="value head, for which a GGUF file has no place"):
        export_here(run, gguf="f16", overwrite=True)
    kind = "lora" if adapter_only else "full"
    torch.testing.assert_close(scores(output, kind), scores(run, "lora"), rtol=2e-6, atol=1e-5)

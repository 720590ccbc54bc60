"""Going on from what was trained before gives what doing it by hand with PEFT gives."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.conftest import tunesmith
from tunesmith.config.arguments import FinetuningArguments, ModelArguments
from tunesmith.errors import ConfigError, ModelError
from tunesmith.model.adapter import load_trainable_params, save_finished, save_trainable, trainable_parameters
from tunesmith.model.lineage import line_of
from tunesmith.model.load import load_base_model
from tunesmith.model.source import locate
from tunesmith.model.tokenizer import load_tokenizer
from tunesmith.model.tuning import init_adapter
from tunesmith.train.finished import open_finished

IDS = torch.arange(3, 43)[None]
CPU = torch.device("cpu")


def load(model: Path) -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    return loaded


def shaken(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """With other trainable weights, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def tuned(
    model: Path, earlier: Sequence[Path] = (), resume: bool = True, seed: int | None = None, **values: Any
) -> torch.nn.Module:
    folders = tuple(map(str, earlier))
    args = ModelArguments(model_name_or_path=str(model), checkpoint_dir=folders, resume_lora_training=resume)
    made = init_adapter(load(model), FinetuningArguments(**values), str(model), line_of(args))
    return made.eval() if seed is None else shaken(made, seed)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def adapter(model: Path, folder: Path, seed: int, **values: Any) -> Path:
    folder.mkdir()
    save_trainable(tuned(model, seed=seed, **values), folder)
    return folder


@pytest.fixture
def two(tiny_model: Path, tmp_path: Path) -> tuple[Path, Path]:
    first = adapter(tiny_model, tmp_path / "first", 1, lora_rank=4)
    return first, adapter(tiny_model, tmp_path / "second", 2, lora_rank=2, lora_target="q_proj,down_proj", use_rslora=True)


def by_hand(model: Path, folders: Sequence[Path]) -> Any:
    made: Any = load(model)
    for folder in folders[:-1]:
        made = PeftModel.from_pretrained(made, folder).merge_and_unload()
    return PeftModel.from_pretrained(made, folders[-1]).eval()


def test_an_adapter_goes_on(tiny_model: Path, two: tuple[Path, Path]) -> None:
    model = tuned(tiny_model, two[:1])
    assert torch.equal(logits(model), logits(by_hand(tiny_model, two[:1])))
    assert all(parameter.dtype == torch.float32 for parameter in trainable_parameters(model).values())
    assert len(trainable_parameters(model)) == 28


def test_a_new_adapter_on_top_of_a_merged_one(tiny_model: Path, two: tuple[Path, Path]) -> None:
    model = tuned(tiny_model, two[:1], resume=False, lora_rank=3)
    merged: Any = PeftModel.from_pretrained(load(tiny_model), two[0]).merge_and_unload()
    assert torch.equal(logits(model), logits(merged))


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings")
def test_what_is_merged_into_a_head_leaves_the_embedding_that_it_shares(shared: Path, tmp_path: Path) -> None:
    base = shared / "models" / "stories260K"
    first = adapter(base, tmp_path / "first", 1, lora_target="lm_head,q_proj")
    wanted = logits(PeftModel.from_pretrained(load(base), first).eval())
    assert load(base).config.tie_word_embeddings
    torch.testing.assert_close(logits(tuned(base, [first], resume=False)), wanted, atol=1e-4, rtol=1e-5)


def test_two_adapters(tiny_model: Path, two: tuple[Path, Path]) -> None:
    assert torch.equal(logits(tuned(tiny_model, two)), logits(by_hand(tiny_model, two)))


@pytest.mark.parametrize(("count", "resume"), [(1, False), (2, True), (2, False)])
def test_the_finished_adapter_is_that_of_the_whole_line(
    tiny_model: Path, two: tuple[Path, Path], tmp_path: Path, count: int, resume: bool
) -> None:
    values: dict[str, Any] = {} if resume else {"lora_rank": 3, "lora_target": "all"}
    model = tuned(tiny_model, two[:count], resume, seed=3, **values)
    (tmp_path / "out").mkdir()
    save_finished(model, tmp_path / "out")
    plain: Any = PeftModel.from_pretrained(load(tiny_model), tmp_path / "out").eval()
    torch.testing.assert_close(logits(plain), logits(model), atol=1e-5, rtol=1e-5)
    assert (logits(plain) - logits(load(tiny_model))).abs().max() > 0.1


def test_pissa_is_saved_as_plain_lora(tiny_model: Path, tmp_path: Path) -> None:
    model = tuned(tiny_model, seed=4, pissa_init=True, pissa_iter=-1, lora_rank=4)
    save_finished(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["init_lora_weights"]) == (8, True)
    plain: Any = PeftModel.from_pretrained(load(tiny_model), tmp_path).eval()
    torch.testing.assert_close(logits(plain), logits(model), atol=1e-4, rtol=1e-4)


def test_weights_of_a_freeze_run_go_on(tiny_model: Path, tmp_path: Path) -> None:
    model = tuned(tiny_model, seed=5, finetuning_type="freeze", num_layer_trainable=1)
    save_trainable(model, tmp_path)
    assert torch.equal(logits(tuned(tiny_model, [tmp_path], finetuning_type="full")), logits(model))
    loaded = load(tiny_model)
    load_trainable_params(loaded, tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_what_was_trained_on_top_goes_on_with_what_it_lies_on_alone(
    tiny_model: Path, two: tuple[Path, Path], tmp_path: Path
) -> None:
    new = tuned(tiny_model, two[:1], resume=False, seed=7)
    checkpoint, done = tmp_path / "checkpoint", tmp_path / "done"
    for folder, save in ((checkpoint, save_trainable), (done, save_finished)):
        folder.mkdir()
        save(new, folder)
    torch.testing.assert_close(logits(tuned(tiny_model, [two[0], checkpoint])), logits(new), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(tuned(tiny_model, [done])), logits(new), atol=1e-5, rtol=1e-5)
    for earlier in ([checkpoint], [two[1], checkpoint]):
        with pytest.raises(ModelError, match=f"was trained on top of {two[0]}"):
            tuned(tiny_model, earlier)
    with pytest.raises(ModelError, match=f"contains {two[0]} already"):
        tuned(tiny_model, [two[0], done])
    with pytest.raises(ModelError, match=f"model_name_or_path: .* was trained on top of {two[0]}"):
        locate(ModelArguments(model_name_or_path=str(checkpoint)))
    with pytest.raises(ModelError, match=r"RUN: .* was trained on top of"):
        open_finished(checkpoint)


def test_an_adapter_on_weights_of_a_freeze_run_needs_them(tiny_model: Path, tmp_path: Path) -> None:
    weights, run = tmp_path / "weights", tmp_path / "run"
    for folder, earlier, values in ((weights, [], {"finetuning_type": "freeze"}), (run, [weights], {"lora_rank": 2})):
        folder.mkdir()
        model = tuned(tiny_model, earlier, seed=8, **values)
        (save_trainable if folder == weights else save_finished)(model, folder)
    assert torch.equal(logits(tuned(tiny_model, [weights, run])), logits(model))
    for check in (lambda: tuned(tiny_model, [run]), lambda: locate(ModelArguments(model_name_or_path=str(run)))):
        with pytest.raises(ModelError, match=f"was trained on top of {weights}"):
            check()


def test_pissa_leaves_out_what_could_not_be_saved(shared: Path, tmp_path: Path) -> None:
    base = shared / "models" / "stories260K"
    for values in ({"lora_target": "embed_tokens"}, {"lora_target": ".*lm_head"}, {"additional_target": "norm"}):
        with pytest.raises(ConfigError, match="pissa_init"):
            tuned(base, pissa_init=True, **values)
    checkpoint = adapter(base, tmp_path / "checkpoint", 1, pissa_init=True, pissa_iter=-1)
    with pytest.raises(ModelError, match="init_lora_weights: pissa"):
        tuned(base, [checkpoint])


@pytest.mark.parametrize("method", ["lily", "randlora"])
def test_tensors_that_layers_share_are_saved(tiny_model: Path, tmp_path: Path, method: str) -> None:
    model = tuned(tiny_model, seed=9, finetuning_type="peft", peft_method=method)
    save_finished(model, tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(load(tiny_model), tmp_path).eval()), logits(model))


def test_an_adapter_that_begins_within_rows_is_not_trained_on(tiny_model: Path, two: tuple[Path, Path]) -> None:
    settings = json.loads((two[0] / "adapter_config.json").read_text(encoding="utf-8"))
    (two[0] / "adapter_config.json").write_text(json.dumps({**settings, "alora_invocation_tokens": [1]}), encoding="utf-8")
    with pytest.raises(ConfigError, match="alora_invocation_tokens"):
        tuned(tiny_model, two[:1])


def test_an_adapter_of_another_method_is_not_trained_on_unasked(
    tiny_model: Path, two: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="is of the method lora, and the settings ask for ia3"):
        tuned(tiny_model, two[:1], finetuning_type="peft", peft_method="ia3")
    oft: dict[str, Any] = {"finetuning_type": "peft", "peft_method": "oft", "peft_args": {"oft_block_size": 8, "r": 0}}
    first = adapter(tiny_model, tmp_path / "oft", 1, **oft)
    assert torch.equal(logits(tuned(tiny_model, [first], **oft)), logits(by_hand(tiny_model, [first])))
    with pytest.raises(ConfigError, match=r"peft_args: .* with other oft_block_size"):
        tuned(tiny_model, [first], **{**oft, "peft_args": {"oft_block_size": 16}})


def test_what_cannot_go_on(tiny_model: Path, two: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora_rank: the adapter in .* is trained on as it is"):
        tuned(tiny_model, two[:1], lora_rank=16)
    with pytest.raises(ConfigError, match="trains the model's own weights"):
        tuned(tiny_model, two[:1], finetuning_type="full")
    with pytest.raises(ConfigError, match="only plain LoRA"):
        tuned(tiny_model, two[:1], resume=False, use_dora=True)
    dora = adapter(tiny_model, tmp_path / "dora", 1, use_dora=True)
    with pytest.raises(ModelError, match="cannot be joined"):
        tuned(tiny_model, [dora], resume=False)
    pickled = adapter(tiny_model, tmp_path / "pickled", 1)
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(ModelError, match="can run code"):
        tuned(tiny_model, [pickled])
    for name, words in ((str(tmp_path / "none"), "no such folder"), (str(tmp_path), "holds neither")):
        with pytest.raises(ModelError, match=words):
            line_of(ModelArguments(model_name_or_path="m", checkpoint_dir=(name,)))
    with pytest.raises(ModelError, match="only be the first entry"):
        line_of(ModelArguments(model_name_or_path="m", checkpoint_dir=(str(two[0]), str(tiny_model))))


@pytest.mark.parametrize(
    "values", [{"quantization_bit": 4}, {"quantization_bit": 8}, {"quantization_bit": 4, "quantization_type": "fp4"}]
)
def test_adapters_stay_beside_on_a_quantised_base(
    tiny_model: Path, two: tuple[Path, Path], tmp_path: Path, values: dict[str, Any]
) -> None:
    """Nothing is merged into rounded weights; the finished adapter is the sum of both on the same base."""
    args = ModelArguments(model_name_or_path=str(tiny_model), checkpoint_dir=tuple(map(str, two)), **values)
    model = init_adapter(
        load_base_model(args, torch.float32, CPU, load_tokenizer(args)), FinetuningArguments(), "base", line_of(args)
    ).eval()
    assert set(model.peft_config) == {"default", "beneath0"}  # type: ignore[arg-type]
    assert all(".default." in name for name in trainable_parameters(model))
    hand: Any = PeftModel.from_pretrained(
        load_base_model(args, torch.float32, CPU, load_tokenizer(args)), two[0], adapter_name="a"
    )
    hand.load_adapter(str(two[1]), adapter_name="b")
    hand.base_model.set_adapter(["a", "b"])
    torch.testing.assert_close(logits(model), logits(hand.eval()), atol=1e-5, rtol=1e-5)
    (tmp_path / "out").mkdir()
    save_finished(shaken(model, 6), tmp_path / "out")
    plain: Any = PeftModel.from_pretrained(
        load_base_model(args, torch.float32, CPU, load_tokenizer(args)), tmp_path / "out"
    ).eval()
    torch.testing.assert_close(logits(plain), logits(model), atol=1e-4, rtol=1e-4)


def test_through_the_command_line(settings: dict[str, Any], write_config: Any, tmp_path: Path, tiny_model: Path) -> None:
    first = tmp_path / "first"
    tunesmith("train", write_config({**settings, "output_dir": str(first), "max_steps": 2}))
    on = {**settings, "checkpoint_dir": str(first), "max_steps": 2, "eval_on_start": True, "val_size": 4, "eval_steps": 2}
    tunesmith("train", write_config({**on, "output_dir": str(tmp_path / "on")}))
    tunesmith("train", write_config({**on, "output_dir": str(tmp_path / "new"), "resume_lora_training": False}))
    started = [
        json.loads((tmp_path / name / "trainer_log.jsonl").read_text().splitlines()[0])["eval_loss"] for name in ("on", "new")
    ]
    assert started[0] == pytest.approx(started[1], abs=1e-5)
    result: Any = PeftModel.from_pretrained(load(tiny_model), tmp_path / "new")
    assert result.peft_config["default"].r == 16  # eight and eight, side by side


def test_all_adapters_that_stay_are_frozen(tiny_model: Path, two: tuple[Path, Path]) -> None:
    args = ModelArguments(
        model_name_or_path=str(tiny_model), quantization_bit=8, checkpoint_dir=tuple(map(str, two)), resume_lora_training=False
    )
    base = load_base_model(args, torch.float32, CPU, load_tokenizer(args))
    model = init_adapter(base, FinetuningArguments(), str(tiny_model), line_of(args))
    assert {"beneath0", "beneath1"} < set(model.peft_config)  # type: ignore[arg-type]
    assert {name.split(".")[-2] for name in trainable_parameters(model)} == {"default"}


def test_rows_of_tokens_with_other_names_are_not_taken(settings: dict[str, Any], write_config: Any) -> None:
    tunesmith("train", write_config({**settings, "add_tokens": ["<foo1>", "<foo2>"], "resize_vocab": True, "max_steps": 1}))
    first = settings["output_dir"]
    on = {**settings, "output_dir": f"{first}-on", "checkpoint_dir": first, "resize_vocab": True, "max_steps": 1}
    done = tunesmith("train", write_config({**on, "add_tokens": ["<foo3>", "<foo4>"]}), check=False)
    assert done.returncode == 2
    assert "'<foo3>' would take the row" in done.stderr
    tunesmith("train", write_config({**on, "add_tokens": ["<foo1>", "<foo2>"]}))


def test_rows_beyond_the_positions_are_remarked_on(settings: dict[str, Any], write_config: Any) -> None:
    config = Path(settings["model_name_or_path"]) / "config.json"
    before = config.read_text(encoding="utf-8")
    try:
        config.write_text(json.dumps({**json.loads(before), "max_position_embeddings": 16}), encoding="utf-8")
        done = tunesmith("train", write_config({**settings, "max_steps": 1}))
    finally:
        config.write_text(before, encoding="utf-8")
    assert "the model was made for 16; set cutoff_len" in done.stdout

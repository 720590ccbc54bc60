"""Reward models on a shared trunk and on their own: saved, loaded again, refused (E4, M1)."""

from __future__ import annotations

import os
import pickle
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, PreTrainedModel

import tunesmith
from tunesmith.config.arguments import FinetuningArguments, ModelArguments
from tunesmith.data.collator import collate_ids
from tunesmith.data.template import ChatTemplate
from tunesmith.errors import ConfigError, ModelError
from tunesmith.model.adapter import save_finished, set_head, trainable_parameters
from tunesmith.model.files import VALUE_HEAD
from tunesmith.model.forward import FlatForward
from tunesmith.model.heads import BIAS, WEIGHT, ValueHead, head_width, row_scores
from tunesmith.model.lineage import line_of
from tunesmith.model.load import load_base_model
from tunesmith.model.reward import ModelScorer, load_reward_model
from tunesmith.model.roles import playing
from tunesmith.model.tokenizer import load_tokenizer, read_tokenizer
from tunesmith.model.tuning import init_adapter
from tunesmith.types import Conversation, Message, Source

BETTER = [np.array(row) for row in ([265, 266, 267, 268], [269, 270, 271], [290, 291, 292, 293, 294, 295])]
WORSE = [np.array(row) for row in ([265, 266, 330], [269, 270, 331, 332, 333], [290, 291, 334])]
ROWS = [*BETTER, *WORSE]


def load(model: Path) -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    return loaded


def train(model: Path, folder: Path, kind: Any = "lora") -> torch.Tensor:
    """A few updates of a reward model on three pairs, saved into a folder; its scores of ``ROWS`` before it was saved."""
    torch.manual_seed(0)
    tuned = init_adapter(load(model), FinetuningArguments(finetuning_type=kind), str(model))
    head = ValueHead(head_width(load(model)))
    set_head(tuned, head)
    forward = FlatForward(tuned, segments=False)
    optimizer = torch.optim.Adam(trainable_parameters(tuned).values(), lr=3e-3)
    for _ in range(12):
        scores = row_scores(forward, head, collate_ids(ROWS))
        loss = -torch.nn.functional.logsigmoid(scores[:3] - scores[3:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5
    folder.mkdir()
    save_finished(tuned, folder)
    tokenizer = read_tokenizer(model)
    tokenizer.chat_template = tokenizer.chat_template or "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return ModelScorer(forward, head, ChatTemplate(tokenizer), nullcontext, torch.float32).row_scores(ROWS)


def reward(model: Path, folder: Path, kind: Any = "lora", trunk: FlatForward | None = None, **values: Any) -> ModelScorer:
    args = ModelArguments(
        model_name_or_path=str(model), reward_model=str(folder), reward_model_type=kind, compute_dtype="fp32",
        attn_implementation="sdpa", **values,
    )  # fmt: skip
    scorer = load_reward_model(args, trunk)
    assert isinstance(scorer, ModelScorer)
    return scorer


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    folder = tmp_path_factory.mktemp("reward") / "rm"
    return folder, train(tiny_model, folder)


def policy(model: Path, *earlier: Path, seed: int = 7, **values: Any) -> PeftModel:
    folders = tuple(map(str, earlier))
    args = ModelArguments(model_name_or_path=str(model), checkpoint_dir=folders, resume_lora_training=not earlier)
    tuned = init_adapter(load(model), FinetuningArguments(**values), str(model), line_of(args))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable_parameters(tuned).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    assert isinstance(tuned, PeftModel)
    return tuned


# ---- E4


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("name", ["stories260K", "stories260K-mixtral"])
def test_e4_scores_survive_saving(shared: Path, tmp_path: Path, kind: str, name: str) -> None:
    model, folder = shared / "models" / name, tmp_path / "rm"
    before = train(model, folder, kind)
    assert (before[:3] > before[3:]).all()
    assert load_file(folder / VALUE_HEAD)[WEIGHT].abs().max() > 0  # other than at the start
    assert torch.equal(reward(model, folder, kind).row_scores(ROWS), before)
    torch.testing.assert_close(reward(model, folder, kind).row_scores(ROWS[::-1]), before.flip(0), rtol=0, atol=1e-5)
    if kind == "lora":  # beside a policy, the experts of a mixture adapted twice
        assert torch.equal(reward(model, folder, trunk=FlatForward(policy(model), segments=False)).row_scores(ROWS), before)
    (folder / VALUE_HEAD).unlink()
    with pytest.raises(ModelError, match=r"value_head\.safetensors: no such file"):
        reward(model, folder, kind)


def test_e4_a_policy_starts_from_it(tiny_model: Path, trained: tuple[Path, torch.Tensor]) -> None:
    folder, before = trained
    model = policy(tiny_model)
    base = {id(parameter): parameter.detach().clone() for parameter in model.parameters()}
    ids = torch.arange(5, 30)[None]
    with torch.no_grad():
        policy_says, bare_says = model(ids).logits, load(tiny_model)(ids).logits
    learning = set(trainable_parameters(model))
    scorer = reward(tiny_model, folder, trunk=FlatForward(model.train(), segments=False))
    assert torch.equal(scorer.row_scores(ROWS), before)
    assert model.training
    assert set(trainable_parameters(model)) == learning
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, policy_says)
        with playing(model):
            assert torch.equal(model(ids).logits, bare_says)
            with playing(model, "reward"):
                assert set(trainable_parameters(model)) == learning
                assert not torch.equal(model(ids).logits, bare_says)
            assert torch.equal(model(ids).logits, bare_says)
        assert torch.equal(model(ids).logits, policy_says)
    kept = {id(parameter): parameter for parameter in model.parameters()}
    assert all(torch.equal(kept[key], value) for key, value in base.items())  # the same tensors, bit-equal: nothing was copied


def test_a_policy_learns_between_scores(tiny_model: Path, trained: tuple[Path, torch.Tensor]) -> None:
    folder, before = trained
    model = policy(tiny_model)
    scorer = reward(tiny_model, folder, trunk=FlatForward(model, segments=False))
    optimizer = torch.optim.SGD(trainable_parameters(model).values(), lr=1.0)
    for _ in range(2):
        model(torch.arange(5, 30)[None]).logits.logsumexp(-1).mean().backward()
        optimizer.step()
        assert torch.equal(scorer.row_scores(ROWS), before)


def test_adapters_beneath_a_quantised_policy_do_not_take_part(
    tiny_model: Path, trained: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    (tmp_path / "sft").mkdir()
    save_finished(policy(tiny_model, lora_rank=2), tmp_path / "sft")
    args = ModelArguments(
        model_name_or_path=str(tiny_model), quantization_bit=4, checkpoint_dir=str(tmp_path / "sft"),  # type: ignore[arg-type]
        resume_lora_training=False, compute_dtype="fp32",
    )  # fmt: skip
    base = load_base_model(args, torch.float32, torch.device("cpu"), load_tokenizer(args))
    model = init_adapter(base, FinetuningArguments(), str(tiny_model), line_of(args))
    scores = reward(tiny_model, trained[0], trunk=FlatForward(model, segments=False), quantization_bit=4).row_scores(ROWS)
    assert torch.equal(scores, reward(tiny_model, trained[0], quantization_bit=4).row_scores(ROWS))
    assert (scores - trained[1]).abs().max() > 1e-3  # those of the whole base


def test_e4_loads_in_plain_peft(tiny_model: Path, trained: tuple[Path, torch.Tensor]) -> None:
    folder, before = trained
    plain: Any = PeftModel.from_pretrained(load(tiny_model), folder).eval()
    head = load_file(folder / VALUE_HEAD)
    with torch.no_grad():
        states = [plain(torch.tensor(row)[None], output_hidden_states=True).hidden_states[-1][0, -1] for row in ROWS]
    scores = torch.stack([head[WEIGHT][0] @ state + head[BIAS][0] for state in states])
    torch.testing.assert_close(scores, before, rtol=0, atol=1e-5)


# ---- conversations


def test_a_conversation_scores_as_its_tokens(tiny_model: Path, trained: tuple[Path, torch.Tensor]) -> None:
    scorer = tunesmith.load_reward_model(
        ModelArguments(model_name_or_path=str(tiny_model), reward_model=str(trained[0]), compute_dtype="fp32")
    )
    assert isinstance(scorer, ModelScorer)
    assert scorer.forward.segments
    said = [("the cat", "sat on a mat"), ("<|im_end|>", "rain"), ("你好", "世界")]
    answered = [
        Conversation((Message("user", prompt), Message("assistant", answer)), Source("rows", "rows.jsonl", i, i))
        for i, (prompt, answer) in enumerate(said, 1)
    ]
    template = ChatTemplate(read_tokenizer(tiny_model))
    rows = [np.array(template.render(conversation.messages).input_ids) for conversation in answered]
    scores = scorer.scores(answered)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, scorer.row_scores(rows), rtol=0, atol=1e-6)
    assert len(set(scores.tolist())) == 3
    assert scorer.scores([]).shape == (0,)
    with pytest.raises(
        ModelError, match=r"rows\.jsonl:9 \(row 9\): ends with a turn by the user; expected the assistant's answer"
    ):
        scorer.scores([Conversation((Message("user", "the"),), Source("rows", "rows.jsonl", 9, 9))])


# ---- whole models


def test_a_sequence_classifier(tiny_model: Path, tmp_path: Path) -> None:
    def make(labels: int) -> Any:
        config = LlamaConfig.from_pretrained(tiny_model, num_labels=labels)
        torch.manual_seed(3)
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
        shutil.rmtree(tmp_path / "classifier", ignore_errors=True)
        model.save_pretrained(tmp_path / "classifier")
        read_tokenizer(tiny_model).save_pretrained(tmp_path / "classifier")
        return model

    model = make(1)
    with torch.no_grad():
        expected = torch.cat([model(torch.tensor(row)[None]).logits[0] for row in ROWS])
    assert expected.abs().max() > 1e-3
    scores = reward(tiny_model, tmp_path / "classifier", "full").row_scores(ROWS)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)
    make(2)
    with pytest.raises(ModelError, match=r"LlamaForSequenceClassification cannot be read .*num_labels: 1"):
        reward(tiny_model, tmp_path / "classifier", "full")


def test_the_adapter_of_a_sequence_classifier(tiny_model: Path, tmp_path: Path) -> None:
    classifier = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, dtype=torch.float32)
    torch.manual_seed(4)
    config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    tuned = get_peft_model(classifier, config).eval()
    tuned.save_pretrained(tmp_path / "rm")
    with torch.no_grad():
        expected = torch.cat([tuned(torch.tensor(row)[None]).logits[0] for row in ROWS])
    assert len(set(expected.tolist())) == 6
    alone = reward(tiny_model, tmp_path / "rm").row_scores(ROWS)
    beside = reward(tiny_model, tmp_path / "rm", trunk=FlatForward(policy(tiny_model), segments=False)).row_scores(ROWS)
    torch.testing.assert_close(alone, expected, rtol=0, atol=1e-6)
    assert torch.equal(alone, beside)


# ---- refused


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def test_a_head_that_was_never_trained(tiny_model: Path, trained: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder = copy(trained[0], tmp_path / "rm")
    save_file({WEIGHT: torch.zeros(1, 64), BIAS: torch.zeros(1)}, folder / VALUE_HEAD)
    with pytest.raises(ModelError, match="all zeros, as before its first update"):
        reward(tiny_model, folder)


def test_a_trunk_that_is_another(tiny_model: Path, trained: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder, _ = trained
    other = copy(tiny_model, tmp_path / "other")
    with pytest.raises(ModelError, match="scores on another model mean nothing"):
        reward(other, folder)
    (tmp_path / "link").symlink_to(tiny_model)
    assert torch.equal(reward(tmp_path / "link", folder).row_scores(ROWS), trained[1])
    with pytest.raises(ConfigError, match="the trunk itself is trained"):
        reward(tiny_model, folder, trunk=FlatForward(load(tiny_model), segments=False))
    (tmp_path / "sft").mkdir()
    save_finished(policy(tiny_model, lora_rank=2), tmp_path / "sft")
    merged = policy(tiny_model, tmp_path / "sft")
    with pytest.raises(ConfigError, match="earlier adapters, or what pissa_init took out"):
        reward(tiny_model, folder, trunk=FlatForward(merged, segments=False))
    other_method = policy(tiny_model, finetuning_type="peft", peft_method="ia3", peft_args={"feedforward_modules": []})
    with pytest.raises(ModelError, match="does not fit beside the others"):
        reward(tiny_model, folder, trunk=FlatForward(other_method, segments=False))


def test_the_type_that_is_meant_is_named(tiny_model: Path, trained: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is an adapter; set reward_model_type: lora"):
        reward(tiny_model, trained[0], "full")
    with pytest.raises(ModelError, match="holds a whole model; set reward_model_type: full"):
        reward(tiny_model, tiny_model)
    with pytest.raises(ModelError, match=r"value_head\.safetensors: no such file"):
        reward(tiny_model, tiny_model, "full")
    for kind in ("lora", "full"):
        with pytest.raises(ModelError, match=r"reward_model: no such folder"):
            reward(tiny_model, tmp_path / "none", kind)


class Payload:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("as_torch", [False, True])
def test_m1_pickles(tiny_model: Path, trained: tuple[Path, torch.Tensor], tmp_path: Path, kind: str, as_torch: bool) -> None:
    whole, canary = kind == "full", tmp_path / "CANARY"
    weights = ("model.safetensors", "pytorch_model.bin") if whole else ("adapter_model.safetensors", "adapter_model.bin")

    def pickled(name: str) -> None:
        folder = copy(tiny_model if whole else trained[0], tmp_path / "rm")
        save_file({WEIGHT: torch.ones(1, 64)}, folder / VALUE_HEAD)
        (folder / (weights[0] if "model" in name else VALUE_HEAD)).unlink()
        if as_torch:
            torch.save(Payload(canary), folder / name)
        else:
            (folder / name).write_bytes(pickle.dumps(Payload(canary)))
        with pytest.raises(ModelError, match=rf"{name}.*pickle"):
            reward(tiny_model, folder, kind)
        with pytest.raises(ModelError, match=r"reward_model: .*\.bin is a pickle" if name.endswith("bin") else "is one file"):
            reward(tiny_model, folder / name, kind)
        shutil.rmtree(folder)

    for name in (*weights, VALUE_HEAD, "value_head.bin", "vhead.bin"):
        pickled(name)
    assert not canary.exists()

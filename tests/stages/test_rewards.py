"""What answers are worth: functions and reward models, alone and mixed, on the policy's own trunk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from tests.model.test_reward import policy, train
from tunesmith.config.arguments import RunConfig
from tunesmith.config.load import load_config
from tunesmith.data.template import ChatTemplate
from tunesmith.errors import ConfigError, DataError, ModelError
from tunesmith.model.adapter import trainable_parameters
from tunesmith.model.forward import FlatForward
from tunesmith.model.reward import ModelScorer
from tunesmith.model.tokenizer import read_tokenizer
from tunesmith.stages.rewards import Answered, Rewards, Scored, load_rewards
from tunesmith.types import Message, PromptExample, Source


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward") / "rm"
    train(tiny_model, folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return read_tokenizer(tiny_model)


def configured(tmp_path: Path, model: Path, **values: Any) -> RunConfig:
    path = tmp_path / "c.yaml"
    given = {"model_name_or_path": str(model), "stage": "grpo", "dataset": "rows", "output_dir": "x", "compute_dtype": "fp32",
             "per_device_train_batch_size": 8, "template_date": "2026-01-01", **values}  # fmt: skip
    path.write_text(json.dumps(given), encoding="utf-8")
    return load_config(path)[0]


def answered(tokenizer: PreTrainedTokenizerBase, *said: tuple[str, str, str, bool]) -> list[Answered]:
    """(question, answer, reference, whether it ended) of each."""
    made = []
    for row, (question, text, reference, ended) in enumerate(said, 1):
        messages = (Message("system", "Hi."), Message("user", question))
        prompt = np.array(ChatTemplate(tokenizer).encode_prompt(messages), dtype=np.int32)
        ids = np.array([*tokenizer.encode(text, add_special_tokens=False), *[tokenizer.eos_token_id] * ended], dtype=np.int32)
        example = PromptExample(prompt, reference, Source("rows", "rows.jsonl", row, row), messages)
        made.append(Answered(example, ids, text, ended))
    return made


def nothing(tiny_model: Path) -> FlatForward:
    return FlatForward(policy(tiny_model), segments=False)


def test_functions_are_added_with_their_weights(tiny_model: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "with open(__file__ + '.runs', 'a') as log:\n    log.write('run')\n"
        "def plain(prompts, responses):\n    return [float(p.endswith('2?')) for p in prompts]\n"
        "def third(prompts, responses, wanted):\n    return [len(w) for w in wanted]\n"
        "def named(prompts, responses, scale=2, *, references):\n    return [scale * len(r) for r in references]\n"
        "def rest(prompts, responses, **given):\n    return [len(r) for r in given['references']]\n"
        "def scaled(prompts, responses, scale=0.5):\n    return [scale] * len(prompts)\n",
        encoding="utf-8",
    )
    weights = {
        "math_answer": 2,
        "length": -0.5,
        **{f"{own}:{name}": 1 for name in ("plain", "third", "named", "rest", "scaled")},
    }
    config = configured(
        tmp_path, tiny_model, reward_functions=weights, reward_options={"length": {"target": 2, "unit": "tokens"}}
    )
    rewards = load_rewards(config, nothing(tiny_model), tokenizer)
    answers = answered(tokenizer, ("2 + 2?", "the", "4", True), ("3 + 2?", "cat 5", "It is 5", True))
    tokens = [len(tokenizer.encode(a.text, add_special_tokens=False)) for a in answers]
    scored = rewards(answers)
    expected = {"math_answer": [0.0, 1.0], "length": [max(0, 1 - abs(t - 2) / 2) for t in tokens], "plain": [1.0, 1.0],
                "third": [1.0, 7.0], "named": [2.0, 14.0], "rest": [1.0, 7.0], "scaled": [0.5, 0.5]}  # fmt: skip
    assert {name: part.tolist() for name, part in scored.parts.items()} == expected
    assert list(scored.parts) == list(expected)
    factors = [2, -0.5, 1, 1, 1, 1, 1]
    assert scored.total_R.dtype == torch.float32
    assert scored.total_R.tolist() == [sum(f * v[i] for f, v in zip(factors, expected.values(), strict=True)) for i in (0, 1)]
    assert (tmp_path / "own.py.runs").read_text() == "run"
    assert rewards([]).total_R.shape == (0,)


def test_what_cannot_be_compared_is_told_before_the_run(
    tiny_model: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rewards = load_rewards(
        configured(tmp_path, tiny_model, reward_functions="math_answer, format"), nothing(tiny_model), tokenizer
    )
    answers = answered(tokenizer, ("a", "b", "4", True), *[("a", "b", " ", True)] * 7)
    words = r"reward_functions: math_answer: 7 of 8 prompts have no answer to compare with: rows\.jsonl:2 \(row 2\), .*row 6\), \.\.\.; give"
    with pytest.raises(DataError, match=words):
        rewards.check([answer.prompt for answer in answers])
    with pytest.raises(DataError, match=words):
        rewards(answers)
    rewards.check([answers[0].prompt])
    with pytest.raises(ConfigError, match=r"reward_options: \{length: \{target: \.\.\.\}\}: is needed and not given"):
        configured(tmp_path, tiny_model, reward_functions="length")


def test_a_total_that_is_no_number_ends_the_run(tiny_model: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    body = "def big(prompts, responses):\n    return [1.0, 3e38]\ndef none(prompts, responses):\n    return [0, 0]\n"
    (own := tmp_path / "own.py").write_text(body, encoding="utf-8")
    config = configured(tmp_path, tiny_model, reward_functions=f"{own}:none, {own}:big: 10")
    assert config.policy.reward_functions == {f"{own}:none": 1.0, f"{own}:big": 10.0}
    rewards = load_rewards(config, nothing(tiny_model), tokenizer)
    with pytest.raises(ModelError, match=r"the reward of rows\.jsonl:2 \(row 2\) is inf"):
        rewards(answered(tokenizer, ("a", "b", "", True), ("a", "c", "", True)))


# ---- models


def scorer_of(rewards: Rewards) -> ModelScorer:
    return rewards.parts["reward_model"].judge._scorer  # type: ignore[attr-defined, no-any-return]


SAID = [("who", "the cat sat", "x", True), ("2?", "red bird fly over", "y", False), ("你好", "", "z", True)]


@pytest.mark.parametrize("training", [True, False])
def test_a_reward_model_on_the_policys_trunk(
    tiny_model: Path, trained: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, training: bool
) -> None:
    model = policy(tiny_model).train(training)
    before = list(model.base_model.active_adapters), set(trainable_parameters(model))
    config = configured(tmp_path, tiny_model, reward_model=str(trained), reward_weight=0.5, reward_functions={"repetition": 3})
    rewards = load_rewards(config, FlatForward(model, segments=False), tokenizer)
    answers = answered(tokenizer, *SAID)
    scored = rewards(answers)
    assert (list(model.base_model.active_adapters), set(trainable_parameters(model))) == before
    assert model.training == training
    assert list(scored.parts) == ["reward_model", "repetition"]
    torch.testing.assert_close(scored.total_R, 0.5 * scored.parts["reward_model"] + 3 * scored.parts["repetition"])
    scorer = scorer_of(rewards)
    whole = [scorer.encode(answer.conversation, answer.ended, sampled=True) for answer in answers]  # as stage rm renders them
    assert [row.tolist() for row in map(rewards.parts["reward_model"].judge._row, answers)] == [row.tolist() for row in whole]  # type: ignore[attr-defined]
    assert tokenizer.decode(whole[0][-2:]) == "<|im_end|>\n"
    assert whole[1].tolist() == [*answers[1].prompt.input_ids.tolist(), *answers[1].ids.tolist()]
    assert torch.equal(scored.parts["reward_model"], scorer.row_scores(whole))
    assert len(set(scored.total_R.tolist())) == 3


def test_other_tokens_or_another_template_are_rendered_anew(
    tiny_model: Path, trained: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    other = read_tokenizer(tiny_model)
    other.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    config = configured(tmp_path, tiny_model, reward_model=str(trained))
    answers = answered(other, *SAID)
    ours, theirs = (load_rewards(config, nothing(tiny_model), one) for one in (tokenizer, other))
    expected = ours(answered(tokenizer, *SAID)).total_R
    torch.testing.assert_close(theirs(answers).total_R, expected)


def test_a_whole_reward_model(tiny_model: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    train(tiny_model, tmp_path / "rm", "full")
    config = configured(tmp_path, tiny_model, reward_model=str(tmp_path / "rm"), reward_model_type="full")
    rewards = load_rewards(config, nothing(tiny_model), tokenizer)
    scored: Scored = rewards(answered(tokenizer, *SAID))
    assert len(set(scored.total_R.tolist())) == 3
    (long,) = answered(tokenizer, ("the " * 600, "cat", "", True))
    with pytest.raises(
        ModelError, match=r"reward_model: rows\.jsonl:1 \(row 1\): prompt and answer have 1,221 tokens, .* for 512"
    ):
        rewards([long])
    with torch.no_grad():
        scorer_of(rewards)._head.summary.bias.fill_(float("nan"))
    with pytest.raises(ModelError, match=r"reward_model: the score of rows\.jsonl:1 \(row 1\) is nan"):
        rewards(answered(tokenizer, *SAID))

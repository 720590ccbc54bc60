"""What is learned of a row: by ``enable_thinking``, ``mask_history``, ``train_on_prompt`` and the weights of its turns."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests.conftest import CHATML, tunesmith, write_dataset
from tests.data.test_prepare import THINKING
from tunesmith.config.arguments import DataArguments
from tunesmith.data.preprocess import preprocess_data
from tunesmith.data.report import DataReport
from tunesmith.data.thinking import LEFT_OUT
from tunesmith.errors import DataError
from tunesmith.types import IGNORE_INDEX, Conversation, Example, Message, PreferencePair, Source, ToolCall

SOURCE = Source("d", "d.jsonl", 1, 1)
PROMPT: dict[str, Any] = {"train_on_prompt": True}
LAST: dict[str, Any] = {"mask_history": True}
TURNS = (
    Message("system", "be"),
    Message("user", "a?"),
    Message("assistant", "A."),
    Message("user", "b?"),
    Message("assistant", "B."),
)
SWITCH = CHATML.replace(
    "<|im_start|>assistant\n' }}", "<|im_start|>assistant\n' + ('' if enable_thinking else '<think></think>') }}"
)


@pytest.fixture
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tiny_model)
    return tokenizer


def made(tokenizer: PreTrainedTokenizerBase, messages: tuple[Message, ...], **values: Any) -> tuple[list[Example], DataReport]:
    report = DataReport()
    args = DataArguments(cutoff_len=512, template_date="2026-01-02", **values)
    return preprocess_data([Conversation(messages, SOURCE)], tokenizer, args, report), report


def weighed(*weights: float) -> tuple[Message, ...]:
    """TURNS with weights of the assistant's turns."""
    left = list(weights)
    return tuple(replace(m, weight=left.pop(0)) if m.role == "assistant" else m for m in TURNS)


def stretches(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[tuple[float, str]]:
    """(weight, text) of the learned stretches of one weight."""
    weights = np.ones(len(example)) if example.weights is None else example.weights
    factors = np.where(example.labels == IGNORE_INDEX, 0, weights)
    cuts = [0, *(np.flatnonzero(np.diff(factors)) + 1).tolist(), len(factors)]
    found = [(float(factors[a]), tokenizer.decode(example.input_ids[a:b])) for a, b in pairwise(cuts)]
    return [(weight, text) for weight, text in found if weight]


def learned(examples: list[Example], tokenizer: PreTrainedTokenizerBase) -> list[list[str]]:
    return [[text for _, text in stretches(example, tokenizer)] for example in examples]


# ---- mask_history


def test_the_last_turn_alone_keeps_its_own_weight(tokenizer: PreTrainedTokenizerBase) -> None:
    (example,), report = made(tokenizer, weighed(2, 0.5), **LAST)
    assert stretches(example, tokenizer) == [(0.5, "B.<|im_end|>")]
    assert tokenizer.decode(example.input_ids) == tokenizer.decode(made(tokenizer, TURNS)[0][0].input_ids)
    assert report.supervised == (example.labels != IGNORE_INDEX).sum()


def test_a_thinking_row_gives_one_example_of_its_last_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = THINKING.replace("\\\n", "")
    thoughts = tuple(replace(m, content=f"<think>t</think>{m.content}") if m.role == "assistant" else m for m in TURNS)
    assert learned(made(tokenizer, thoughts, **LAST)[0], tokenizer) == [["<think>t</think>B.<|im_end|>"]]


def test_a_last_turn_of_weight_zero_leaves_nothing_and_says_so(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match=r"has the weight 0, and mask_history learns no other \(d.jsonl:1 \(row 1\)\)"):
        made(tokenizer, weighed(1, 0), **LAST)


# ---- train_on_prompt


def test_everything_but_the_first_token_is_learned(tokenizer: PreTrainedTokenizerBase) -> None:
    (example,), report = made(tokenizer, TURNS, **PROMPT)
    assert example.labels[0] == IGNORE_INDEX
    assert example.labels[1:].tolist() == example.input_ids[1:].tolist()
    assert example.weights is None
    assert (report.tokens, report.supervised) == (len(example), len(example) - 1)


def test_turns_keep_their_weights_in_it(tokenizer: PreTrainedTokenizerBase) -> None:
    (example,), report = made(tokenizer, weighed(0, 0.5), **PROMPT)
    assert stretches(example, tokenizer) == [
        (1, "system\nbe<|im_end|>\n<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\n"),
        (1, "\n<|im_start|>user\nb?<|im_end|>\n<|im_start|>assistant\n"),
        (0.5, "B.<|im_end|>"),
        (1, "\n"),
    ]
    assert report.supervised == (example.labels != IGNORE_INDEX).sum()


def test_what_a_later_view_shows_otherwise_is_learned_once_as_served(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = THINKING.replace("\\\n", "")
    thoughts = tuple(replace(m, content=f"<think>t</think>{m.content}") if m.role == "assistant" else m for m in TURNS)
    examples, report = made(tokenizer, thoughts, **PROMPT)
    assert learned(examples, tokenizer) == [
        ["<think>t</think>A.<|im_end|>"],
        [
            "system\nbe<|im_end|>\n<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\n",
            "\n<|im_start|>user\nb?<|im_end|>\n<|im_start|>assistant\n<think>t</think>B.<|im_end|>\n",
        ],
    ]
    assert report.kept == 1
    assert report.supervised == sum((e.labels != IGNORE_INDEX).sum() for e in examples)


def test_what_follows_the_last_answer_is_learned_too(tokenizer: PreTrainedTokenizerBase) -> None:
    (example,), _ = made(tokenizer, (*TURNS, Message("user", "c?")), **PROMPT)
    assert (example.labels[1:] != IGNORE_INDEX).all()
    assert tokenizer.decode(example.input_ids).endswith("B.<|im_end|>\n<|im_start|>user\nc?<|im_end|>\n")
    tokenizer.chat_template = THINKING.replace("\\\n", "")
    thoughts = (*TURNS[:2], Message("assistant", "<think>t</think>A."), Message("user", "c?"))
    own, whole = made(tokenizer, thoughts, **PROMPT)[0]
    assert learned([own], tokenizer) == [["<think>t</think>A.<|im_end|>"]]
    assert learned([whole], tokenizer)[0][1] == "\n<|im_start|>user\nc?<|im_end|>\n"


def test_an_empty_turn_of_weight_zero_is_no_obstacle(tokenizer: PreTrainedTokenizerBase) -> None:
    silent = (*TURNS[:2], Message("assistant", "", weight=0), *TURNS[3:])
    (example,), _ = made(tokenizer, silent, **PROMPT)
    assert (example.labels[1:] != IGNORE_INDEX).all()


def test_long_rows_are_split_without_losing_a_token(tokenizer: PreTrainedTokenizerBase) -> None:
    report = DataReport()
    args = DataArguments(cutoff_len=16, truncation="split", train_on_prompt=True)
    parts = preprocess_data([Conversation(TURNS, SOURCE)], tokenizer, args, report)
    whole = made(tokenizer, TURNS, **PROMPT)[0][0]
    assert np.concatenate([part.labels for part in parts])[1:].tolist() == whole.input_ids[1:].tolist()
    assert report.supervised == len(whole) - len(parts)  # the first token of a part is predicted by nothing


def test_tools_and_their_answers_are_learned_too(tokenizer: PreTrainedTokenizerBase, shared: Path) -> None:
    tokenizer.chat_template = (shared / "templates/Qwen-Qwen3-0.6B.jinja").read_text(encoding="utf-8")
    row = Conversation(
        (
            TURNS[1],
            Message("assistant", "", "Ask.", (ToolCall("f", {}),)),
            Message("tool", "4"),
            Message("assistant", "A.", "So."),
        ),
        SOURCE,
        ({"type": "function", "function": {"name": "f"}},),
    )
    (example,) = preprocess_data([row], tokenizer, DataArguments(**PROMPT), DataReport())
    assert example.labels[1:].tolist() == example.input_ids[1:].tolist()
    assert '{"type": "function", "function": {"name": "f"}}' in tokenizer.decode(example.input_ids)


# ---- enable_thinking

A, B = "A.<|im_end|>", "B.<|im_end|>"
EMPTY = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize("reasoning", ["none", "apart", "inline"])
@pytest.mark.parametrize("thinking", [None, True, False])
def test_qwen3_learns_what_serving_shows_after_its_prompt(
    tokenizer: PreTrainedTokenizerBase, shared: Path, thinking: bool | None, reasoning: str
) -> None:
    tokenizer.chat_template = (shared / "templates/Qwen-Qwen3-0.6B.jinja").read_text(encoding="utf-8")
    given = TURNS
    if reasoning == "apart":
        given = tuple(replace(m, reasoning="T") if m.role == "assistant" else m for m in TURNS)
    elif reasoning == "inline":
        given = tuple(replace(m, content=f"<think>\nT\n</think>\n\n{m.content}") if m.role == "assistant" else m for m in TURNS)
    options = {} if thinking is None else {"enable_thinking": thinking}
    examples, report = made(tokenizer, given, **options)
    opening = "" if thinking is False else (EMPTY if reasoning == "none" else "<think>\nT\n</think>\n\n")
    assert learned(examples, tokenizer) == [[opening + A], [opening + B]]
    for index, example in zip((2, 4), examples, strict=True):
        asked = [{"role": m.role, "content": m.content} for m in given[:index]]
        prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True, **options)
        assert tokenizer.decode(example.input_ids[: (example.labels != IGNORE_INDEX).argmax()]) == prompt
        assert prompt.endswith(EMPTY) == (thinking is False)
    notes = [finding.message for finding in report.of("note")]
    assert (LEFT_OUT in notes) == (thinking is False and reasoning != "none")


def test_pairs_lose_their_reasoning_too(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = SWITCH
    pair = PreferencePair(TURNS[1:2], (replace(TURNS[2], content="<think>T</think>A."),), (TURNS[4],), SOURCE)
    (example,) = preprocess_data([pair], tokenizer, DataArguments(enable_thinking=False), report := DataReport(), "dpo")
    assert learned([example.chosen, example.rejected], tokenizer) == [[A], [B]]
    assert [finding.count for finding in report.of("note") if finding.message == LEFT_OUT] == [1]


def test_a_row_that_is_nothing_but_thought_keeps_it(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = SWITCH
    given = (TURNS[1], Message("assistant", "<think>hm</think>"))
    examples, report = made(tokenizer, given, enable_thinking=False)
    assert learned(examples, tokenizer) == [["<think>hm</think><|im_end|>"]]
    assert LEFT_OUT not in [finding.message for finding in report.of("note")]


def test_a_template_without_the_switch_changes_nothing_and_says_so(
    settings: dict[str, Any], write_config: Any, caplog: pytest.LogCaptureFixture
) -> None:
    config = write_config({**settings, "max_steps": 1, "enable_thinking": False})
    said = "enable_thinking has no effect: the chat template never looks at it"
    (warning,) = json.loads(tunesmith("check", config, "--json").stdout)["warnings"]
    assert (warning["code"], warning["message"]) == ("no-effect", said)
    assert f"warning: {said}" in tunesmith("train", config).stdout
    assert said in tunesmith("preview", config).stdout
    tunesmith("chat", settings["output_dir"], "--prompt", "a", "max_new_tokens=1")
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [said]


# ---- through the command line


@pytest.fixture
def switched(settings: dict[str, Any], tiny_model: Path, tmp_path: Path) -> dict[str, Any]:
    """A configuration with a template that knows the switch, and rows of two turns."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = SWITCH
    model = tmp_path / "model"
    model.mkdir()
    for path in tiny_model.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    tokenizer.save_pretrained(model)
    rows = [{"messages": [{"role": m.role, "content": m.content} for m in TURNS]}] * 4
    write_dataset(Path(settings["dataset_dir"]), rows, "two", formatting="openai")
    return {**settings, "model_name_or_path": str(model), "dataset": "two", "max_steps": 2, "save_steps": 1}


def shown(config: Path, *overrides: str) -> list[str]:
    """What is learned of the first row."""
    value = json.loads(tunesmith("preview", config, "--json", "--rows", 1, *overrides).stdout)
    pieces: list[str] = value["examples"][0]["learned_text"]
    return pieces


def test_a_run_keeps_the_switch_for_chat_and_chat_can_turn_it(
    switched: dict[str, Any], write_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunesmith.serve.chat import load_chat
    from tunesmith.stages import samples

    sampled: list[dict[str, Any]] = []

    class Watched(samples.ChatEngine):
        def answer(self, *args: Any) -> str:
            sampled.append(self.template.options)
            return super().answer(*args)

    monkeypatch.setattr(samples, "ChatEngine", Watched)
    run = switched["output_dir"]
    tunesmith("train", write_config({**switched, "enable_thinking": True, "sample_prompts": ["a?"]}))
    assert sampled == [{"enable_thinking": True}] * 2
    asked = [Message("user", "a?")]
    for target, arguments, ending in (
        (run, (), "assistant\n"),
        (run, ("enable_thinking=false",), "assistant\n<think></think>"),
        (switched["model_name_or_path"], (), "assistant\n<think></think>"),
        (switched["model_name_or_path"], ("enable_thinking=true",), "assistant\n"),
    ):
        assert load_chat(target, arguments).engine.template.text(asked, add_generation_prompt=True).endswith(ending)
    refused = tunesmith("chat", switched["model_name_or_path"], "--prompt", "a", "cutoff_len=3", check=False)
    assert "cutoff_len: settings of training" in refused.stderr


def test_preview_shows_each_key_and_resuming_with_another_is_refused(switched: dict[str, Any], write_config: Any) -> None:
    config = write_config(switched)
    assert shown(config) == ["A.<|im_end|>", "B.<|im_end|>"]
    assert shown(config, "mask_history=true") == ["B.<|im_end|>"]
    (everything,) = shown(config, "train_on_prompt=true")
    assert everything.startswith("system\nbe")
    certified = tunesmith("preview", config, "--row", 1, "train_on_prompt=true").stdout
    assert re.search(r"learned: message 3 at .*; message 5 at .*; all text outside the assistant's turns", certified)
    assert "nothing else" in tunesmith("preview", config, "--row", 1).stdout
    assert "uses no data set 'other'" in tunesmith("preview", config, "--row", "other:1", check=False).stderr
    tunesmith("train", config)
    for key in ("mask_history=true", "train_on_prompt=true"):
        done = tunesmith("train", config, "max_steps=3", "resume_from_checkpoint=auto", key, check=False)
        assert done.returncode == 2
        assert "training data: " in done.stderr


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mask_history": True, "train_on_prompt": True}, "keep one of the two"),
        ({"mask_history": True, "stage": "pt"}, "mask_history: has no meaning with stage: pt"),
        ({"train_on_prompt": True, "stage": "pt"}, "train_on_prompt: has no meaning with stage: pt"),
    ],
)
def test_keys_that_contradict_are_refused(
    settings: dict[str, Any], write_config: Any, changes: dict[str, Any], said: str
) -> None:
    done = tunesmith("train", write_config({**settings, **changes}), check=False)
    assert done.returncode == 2
    assert said in done.stderr

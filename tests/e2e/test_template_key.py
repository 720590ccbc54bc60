"""``template: NAME`` through the command line: it is trained with, kept, and chatted with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig

from tests.conftest import tunesmith

WriteConfig = Callable[[dict[str, Any]], Path]


def test_a_named_template_is_trained_with_and_kept(settings: dict[str, Any], write_config: WriteConfig) -> None:
    settings.update(template="alpaca", finetuning_type="full", max_steps=1, sample_prompts=["the cat"], sample_max_new_tokens=2)
    config, run = write_config(settings), Path(settings["output_dir"])
    differs = "template 'alpaca' differs from the model's own: 'Below is an instruction"
    assert differs in tunesmith("train", config).stdout
    assert any(differs in note for note in json.loads(tunesmith("check", config, "--json").stdout)["notes"])
    seen = json.loads(tunesmith("preview", config, "--json", "--rows", 1).stdout)
    assert any(differs in note for note in seen["report"]["found"])
    assert "### Instruction:\n" in seen["examples"][0]["text"]
    assert all(piece.endswith("<|im_end|>") for piece in seen["examples"][0]["learned_text"])

    tokenizer = AutoTokenizer.from_pretrained(run)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "q"}], tokenize=False, add_generation_prompt=True)
    assert text.startswith("Below is") and text.endswith("\n\n### Instruction:\nq\n\n### Response:\n")
    assert GenerationConfig.from_pretrained(run).eos_token_id == tokenizer.eos_token_id
    assert tunesmith("chat", run, "max_new_tokens=2", "--prompt", "the cat").stderr == ""
    refused = tunesmith("chat", run, "template=chatml", "--prompt", "the cat", check=False)
    assert refused.returncode == 2 and "settings of training" in refused.stderr


def test_the_end_of_a_turn_becomes_a_stop_of_the_saved_model(
    settings: dict[str, Any], write_config: WriteConfig, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.jinja"
    mine.write_text(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|endoftext|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        encoding="utf-8",
    )
    settings.update(template=str(mine), finetuning_type="full", max_steps=1)
    tunesmith("train", write_config(settings))
    tokenizer = AutoTokenizer.from_pretrained(settings["output_dir"])
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert sorted(GenerationConfig.from_pretrained(settings["output_dir"]).eos_token_id) == sorted(ends)


def test_wrong_templates_are_refused_and_known_ones_listed(
    settings: dict[str, Any], write_config: WriteConfig, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    done = tunesmith("train", write_config({**settings, "template": "alpca"}), check=False)
    assert done.returncode == 2 and "did you mean 'alpaca'" in done.stderr
    listed = tunesmith("templates").stdout.splitlines()
    assert any(line.startswith("qwen3 ") and line.endswith("Qwen3: ChatML with reasoning and tools") for line in listed)
    assert tunesmith("templates", "chatml").stdout.startswith("{%- set end_of_turn = '<|im_end|>' -%}")
    tunesmith("chat", tiny_model, "template=vicuna", "max_new_tokens=2", "--prompt", "the cat")
    assert "template 'vicuna' differs" in caplog.text

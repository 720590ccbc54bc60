from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tunesmith.config.arguments import (
    SECTIONS,
    DataArguments,
    DataTrainingArguments,
    FinetuningArguments,
    GeneratingArguments,
)
from tunesmith.config.load import dump_yaml, load_config, load_model_settings
from tunesmith.config.rules import NICKNAMES, NO_EFFECT, UNSUPPORTED
from tunesmith.errors import ConfigError

GOOD = {"model_name_or_path": "m", "dataset": "a,b", "output_dir": "out"}


def write(tmp_path: Path, text: str, name: str = "c.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def refusal(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text), overrides)
    return str(caught.value)


def test_yaml_json_and_arguments_agree(tmp_path: Path) -> None:
    values = {**GOOD, "learning_rate": 1e-4, "lora_target": ["q_proj", "v_proj"]}
    from_yaml, _ = load_config(write(tmp_path, yaml.safe_dump(values)))
    from_json, _ = load_config(write(tmp_path, json.dumps(values), "c.json"))
    arguments = [f"{k}={json.dumps(v) if not isinstance(v, str) else v}" for k, v in values.items()]
    from_arguments, _ = load_config(None, arguments)
    assert from_yaml == from_json == from_arguments
    assert from_yaml.data.dataset == ("a", "b")


def test_exponents_are_numbers_and_arguments_win(tmp_path: Path) -> None:
    path = write(tmp_path, yaml.safe_dump(GOOD) + "learning_rate: 1e-4\n")
    assert load_config(path)[0].training.learning_rate == 1e-4
    assert load_config(path, ["learning_rate=3e-5"])[0].training.learning_rate == 3e-5


@pytest.mark.parametrize("value", ["no", "'no'", "false"])
def test_a_bare_no_is_no(tmp_path: Path, value: str) -> None:
    config, _ = load_config(write(tmp_path, yaml.safe_dump(GOOD) + f"eval_strategy: {value}\nsave_strategy: {value}\n"))
    assert config.training.eval_strategy == config.training.save_strategy == "no"


def test_misspelt_key_names_the_right_one(tmp_path: Path) -> None:
    message = refusal(tmp_path, yaml.safe_dump(GOOD) + "learnng_rate: 1e-4\n")
    assert "c.yaml:4:1" in message
    assert "Did you mean learning_rate?" in message


def test_three_wrong_keys_are_three_errors_in_one_message(tmp_path: Path) -> None:
    text = yaml.safe_dump(GOOD) + "lora_rank: 0\nseed: abc\nbatch: -1\n"
    message = refusal(tmp_path, text)
    assert message.startswith("3 problems")
    for line, key in ((4, "lora_rank"), (5, "seed"), (6, "batch")):
        assert f"c.yaml:{line}:1  {key}: " in message


@pytest.mark.parametrize("key", sorted(k for cls in SECTIONS.values() for k in cls.model_fields))
def test_every_key_survives_a_dropped_letter(tmp_path: Path, key: str) -> None:
    index = len(key) // 2
    wrong = key[:index] + key[index + 1 :]
    if any(wrong in cls.model_fields for cls in SECTIONS.values()) or wrong in UNSUPPORTED or wrong in NO_EFFECT:
        pytest.skip(f"{wrong} is a key itself")
    message = refusal(tmp_path, yaml.safe_dump(GOOD) + f"{wrong}: 1\n")
    assert f"Did you mean {key}?" in message


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("learning_rate: .nan", "finite"),
        ("learning_rate: -1", "greater than 0"),
        ("num_train_epochs: '3; rm'", "valid number"),
        ("lora_rank: 1.5", "integer"),
        ("bf16: maybe", "boolean"),
        ("stage: pppo", "'sft'"),
        ("template: ''", "at least 1 character"),
        ("max_steps: 0", "0 updates"),
        ("val_size: 2.5", "whole number"),
        ("load_best_model_at_end: true", "needs evaluation"),
        ("eval_steps: 5", "nothing to evaluate on"),
        ("val_size: 0.1", "never used"),
        ("use_fast_tokenizer: false", "offsets"),
        ("source_prefix: a|b|c", "3 prefixes for 2 data sets"),
        ("streaming: true", "needs max_steps: N"),
        ("buffer_size: 100", "with streaming: true only"),
    ],
)
def test_bad_values_are_refused(tmp_path: Path, line: str, said: str) -> None:
    message = refusal(tmp_path, yaml.safe_dump(GOOD) + line + "\n")
    assert said in message
    assert "c.yaml:4:1" in message


def test_contradictions_are_refused(tmp_path: Path) -> None:
    text = yaml.safe_dump(GOOD) + "bf16: true\nfp16: true\nval_size: 0.1\ndev_ratio: 0.1\neval_steps: 3\n"
    message = refusal(tmp_path, text)
    assert "bf16 and fp16" in message
    assert "val_size and dev_ratio" in message


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("val_size: 0.1\neval_steps: 2", "val_size: a share of a stream is not known before its end"),
        ("dev_ratio: 0.1\neval_steps: 2", "dev_ratio: a share of a stream"),
        ("group_by_length: true", "does not go with streaming"),
        ("tokenized_path: x", "only those of eval_dataset are stored"),
        ("buffer_size: 9\ndisable_shuffling: true", "nothing is shuffled or packed"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(tmp_path: Path, lines: str, said: str) -> None:
    assert said in refusal(tmp_path, yaml.safe_dump({**GOOD, "streaming": True, "max_steps": 5}) + lines + "\n")


@pytest.mark.parametrize("line", ["packing: true", "disable_shuffling: true", "stage: pt"])
def test_grouping_by_length_needs_rows_of_several_lengths_in_no_order(tmp_path: Path, line: str) -> None:
    message = refusal(tmp_path, yaml.safe_dump({**GOOD, "group_by_length": True}) + line + "\n")
    assert f"does not go with {line.split(':')[0]}" in message


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system [touch CANARY]",
        "dataset: !!python/object/apply:os.system [touch CANARY]",
        "output_dir: !!binary aGVsbG8=",
    ],
)
def test_object_tags_are_refused_and_run_nothing(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "the tag" in refusal(tmp_path, text)
    assert not (tmp_path / "CANARY").exists()


def test_alias_bomb_is_refused_at_once(tmp_path: Path) -> None:
    lines = ["a: &a [x,x,x,x,x,x,x,x,x]"]
    lines += [f"{b}: &{b} [{','.join(['*' + a] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
    began = time.monotonic()
    assert "aliases" in refusal(tmp_path, "\n".join(lines))
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("name", ["c.yaml", "c.json"])
def test_repeated_keys_are_refused(tmp_path: Path, name: str) -> None:
    text = '{"model_name_or_path": "m", "dataset": "a", "output_dir": "o", "seed": 1, "seed": 2}'
    with pytest.raises(ConfigError, match="seed: given twice"):
        load_config(write(tmp_path, text, name))
    inner = text.replace('"seed": 1, "seed": 2', '"stage": "dpo", "pref_loss": {"sigmoid": 1, "sigmoid": 2}')
    with pytest.raises(ConfigError, match="sigmoid: given twice"):
        load_config(write(tmp_path, inner, name))


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2\n", "just text", "{"])
def test_what_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    assert "c.yaml" in refusal(tmp_path, text)


def test_deep_nesting_is_refused(tmp_path: Path) -> None:
    assert "c.yaml" in refusal(tmp_path, "seed: " + "[" * 20000)


def test_missing_file_and_missing_keys(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such configuration file"):
        load_config(tmp_path / "none.yaml")
    message = refusal(tmp_path, "seed: 1")
    assert "model_name_or_path" in message
    assert "output_dir" in message


def test_byte_order_mark_is_no_trouble_and_gbk_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bom.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + yaml.safe_dump(GOOD).encode())
    assert load_config(path)[0].data.dataset == ("a", "b")
    path.write_bytes("output_dir: 训练".encode("gbk"))
    with pytest.raises(ConfigError, match="UTF-8"):
        load_config(path)


def test_keys_without_effect_are_noticed_not_refused(tmp_path: Path) -> None:
    _, notices = load_config(write(tmp_path, yaml.safe_dump({**GOOD, "ddp_timeout": 180000000})))
    assert len(notices) == 1
    assert "ddp_timeout has no effect" in notices[0]


def test_unsupported_keys_say_what_to_do(tmp_path: Path) -> None:
    assert "without padding" in refusal(tmp_path, yaml.safe_dump({**GOOD, "flash_attn": "fa2"}))
    assert "checkpoint_dir" in refusal(tmp_path, yaml.safe_dump({**GOOD, "adapter_name_or_path": "runs/x"}))


@pytest.mark.parametrize("stage", ["pt", "sft"])
def test_no_stage_ignores_a_reward_model(tmp_path: Path, stage: str) -> None:
    keys = {"reward_model": "runs/rm", "reward_model_type": "full", "reward_timeout": 5}
    said = refusal(tmp_path, yaml.safe_dump({**GOOD, "stage": stage, **keys}))
    for key in keys:
        assert f"{key}: has no meaning with stage: {stage}, where nothing is scored" in said
    with pytest.raises(ConfigError, match="reward_model: has no meaning with chat"):
        load_model_settings("m", ["reward_model=runs/rm"])


def test_tables_hold_no_key_that_exists() -> None:
    keys = {key for cls in SECTIONS.values() for key in cls.model_fields}
    assert not keys & (UNSUPPORTED.keys() | NO_EFFECT.keys() | NICKNAMES.keys())
    assert set(NICKNAMES.values()) <= keys


def test_no_key_stands_in_two_sections() -> None:
    keys = [key for cls in SECTIONS.values() for key in cls.model_fields]
    assert len(keys) == len(set(keys))


def test_resolved_config_reads_back_equal(tmp_path: Path) -> None:
    config, _ = load_config(write(tmp_path, yaml.safe_dump({**GOOD, "sample_prompts": ["你是谁？"]})))
    dump_yaml(config, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml")[0] == config


def test_sections_are_frozen_and_json_round_trips(tmp_path: Path) -> None:
    args = FinetuningArguments(lora_rank=4, lora_target="q_proj, v_proj")
    with pytest.raises(ValueError, match="frozen"):
        args.lora_rank = 8  # type: ignore[misc]
    args.save_to_json(tmp_path / "f.json")
    assert FinetuningArguments.load_from_json(tmp_path / "f.json") == args
    assert list(json.loads((tmp_path / "f.json").read_text())) == sorted(FinetuningArguments.model_fields)
    assert DataTrainingArguments is DataArguments


@pytest.mark.parametrize("more", [{}, {"stage": "grpo", "reward_functions": "repetition", "per_device_train_batch_size": 8}])
def test_max_length_alone_is_a_limit_that_no_default_wins_over(tmp_path: Path, more: dict[str, Any]) -> None:
    config, _ = load_config(write(tmp_path, yaml.safe_dump({**GOOD, **more, "max_length": 60})))
    assert config.generating.to_dict().keys() & {"max_length", "max_new_tokens"} == {"max_length"}
    dump_yaml(config, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml")[0] == config


def test_max_new_tokens_wins_over_max_length() -> None:
    assert "max_length" not in GeneratingArguments(max_length=10, max_new_tokens=5).to_dict()
    assert GeneratingArguments(max_length=10, max_new_tokens=None).to_dict()["max_length"] == 10
    assert "temperature" not in GeneratingArguments(do_sample=False).to_dict()

"""Inheritance, references and errors of pipeline files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tunesmith.config.pipeline import Pipeline, load_pipeline
from tunesmith.errors import ConfigError

COMMON = {"model_name_or_path": "m", "output_dir": "out", "dataset": "rows", "learning_rate": 1e-3}
PT, SFT = {"name": "pt", "stage": "pt"}, {"name": "sft", "checkpoint_dir": "${pt}"}
RM = {"name": "rm", "stage": "rm", "checkpoint_dir": "${sft}"}


def load(folder: Path, stages: Any, *overrides: str, **common: Any) -> Pipeline:
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump({**COMMON, **common, "stages": stages}, sort_keys=False), encoding="utf-8")
    return load_pipeline(path, overrides)


def refusal(folder: Path, stages: Any, *overrides: str, **common: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, stages, *overrides, **common)
    return str(caught.value)


def test_stages_inherit_and_refer_to_folders_of_earlier_ones(tmp_path: Path) -> None:
    (tmp_path / "sft.yaml").write_text(
        "checkpoint_dir: ${pt}/checkpoint-3\nlearning_rate: 3e-4\nlora_rank: 4\noutput_dir: mine\n"
    )
    stages = [
        {**PT, "sample_prompts": None},
        {"config": "sft.yaml", "learning_rate": 2e-4},
        {**RM, "checkpoint_dir": ["${pt}", "${sft}"], "sample_prompts": None},
    ]
    made = load(tmp_path, stages, sample_prompts=["Who?"])
    pt, sft, rm = made.stages
    assert made.folder == Path("out")
    assert [stage.name for stage in made.stages] == ["pt", "sft", "rm"]
    assert [str(stage.run) for stage in made.stages] == ["out/pt", "mine", "out/rm"]
    assert [stage.config.training.learning_rate for stage in made.stages] == [1e-3, 2e-4, 1e-3]
    assert [stage.config.training.sample_prompts for stage in made.stages] == [(), ("Who?",), ()]
    assert sft.config.model.checkpoint_dir == ("out/pt/checkpoint-3",)
    assert rm.config.model.checkpoint_dir == ("out/pt", "mine")
    assert (pt.uses, sft.uses, rm.uses) == ((), ("pt",), ("pt", "sft"))
    assert sft.values["lora_rank"] == 4 and "sample_prompts" not in pt.values


def test_arguments_reach_all_stages_or_one(tmp_path: Path) -> None:
    made = load(tmp_path, [PT, SFT], "max_steps=3", "sft.max_steps=5", "output_dir=other", "sft.overwrite_output_dir=true")
    assert [stage.config.training.max_steps for stage in made.stages] == [3, 5]
    assert [str(stage.run) for stage in made.stages] == ["other/pt", "other/sft"]
    assert [stage.anew for stage in made.stages] == [False, True]
    assert "argument sfd.max_steps  no stage named sfd; did you mean sft?" in refusal(tmp_path, [PT, SFT], "sfd.max_steps=5")


def test_rows_that_an_earlier_stage_makes_are_known_to_be_so(tmp_path: Path) -> None:
    made = load(tmp_path, [PT, {**SFT, "dataset": "${pt}/rows.jsonl"}])
    assert [stage.opaque for stage in made.stages] == [False, True]


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([PT, {**SFT, "checkpoint_dir": "${ptt}"}], "sft.checkpoint_dir: no stage named ptt; did you mean pt?"),
        ([SFT, PT], "sft.checkpoint_dir: ${pt} comes later; stages run in the order of the list, so put pt before sft"),
        ([{**PT, "checkpoint_dir": "${pt}"}], "pt.checkpoint_dir: ${pt} is this stage itself"),
        ([{**PT, "checkpoint_dir": "${rm}"}, SFT, RM], "pt.checkpoint_dir: ${rm} in turn needs pt: a circle"),
        ([PT, {**SFT, "output_dir": "out/./pt"}], "sft.output_dir: out/./pt is that of pt, too"),
        ([{**PT, "output_dir": "out"}], "pt.output_dir: out is that of the pipeline itself"),
        ([PT, {**PT}], "pt: two stages of this name"),
        ([{"stage": "pt"}], "a stage is named by letters"),
        ([{**PT, "config": "none.yaml"}], "no such configuration file"),
        ([], "stages: no stage is given"),
        ({"pt": PT}, "no list of stages"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, stages: Any, said: str) -> None:
    assert said in refusal(tmp_path, stages)


def test_all_problems_of_all_stages_come_at_once_and_inherited_ones_once(tmp_path: Path) -> None:
    stages = [{**PT, "learnng_rate": 1}, {**SFT, "packing": "maybe"}, RM]
    said = refusal(tmp_path, stages, lorra_rank=3, sample_prompts=["Who?"])
    assert "pipeline.yaml:11:3  pt.learnng_rate: unknown key. Did you mean learning_rate?" in said
    assert "sft.packing: " in said
    assert said.count("lorra_rank") == 1
    assert "sample_prompts: a reward model answers nothing; remove the key (inherited by rm, where null unsets it)" in said
    assert said.startswith("4 problems in ")


def test_the_folder_of_the_pipeline_has_to_be_given(tmp_path: Path) -> None:
    assert "output_dir: required at the top" in refusal(tmp_path, [PT], output_dir=None)

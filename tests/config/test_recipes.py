"""The recipes of the guide load, ask for what their names say, and are the same in both languages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from tunesmith.config.load import load_config

BASE = "model_name_or_path: m\ndataset: prompts\noutput_dir: out\n"
MEANT = {
    "PPO": {"grpo_loss": "dapo", "kl_control": "fixed", "ppo_epochs": 4},
    "RLHF": {"kl_control": "adaptive", "reward_clip": 5.0},
    "GRPO": {"grpo_loss": "grpo", "scale_rewards": "group", "kl_estimator": "k3"},
    "DAPO": {"grpo_loss": "dapo", "cliprange_high": 0.28, "mask_truncated": True, "kl_coef": 0.0},
    "Dr. GRPO": {"grpo_loss": "dr_grpo", "scale_rewards": "none"},
    "GSPO": {"importance_level": "sequence", "cliprange": 3e-4, "cliprange_high": 4e-4},
    "RLOO": {"group_baseline": "leave_one_out", "scale_rewards": "none"},
}


def recipes(guide: str) -> dict[str, str]:
    """By name."""
    text = (ROOT / "docs" / guide).read_text(encoding="utf-8")
    blocks = re.findall(r"<!-- recipe -->\n```yaml\n# (.*?)\n(.*?)```", text, re.DOTALL)
    return {re.split(r" \(|: | on ", title.removeprefix("Classic "))[0]: body for title, body in blocks}


@pytest.mark.parametrize("name", MEANT)
def test_it_loads(name: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(BASE + recipes("guide.md")[name], encoding="utf-8")
    policy = load_config(path)[0].policy
    assert MEANT[name].items() <= vars(policy).items()


def test_both_guides_have_the_same_ones() -> None:
    english, chinese = recipes("guide.md"), recipes("guide_zh.md")
    assert english.keys() == chinese.keys() == MEANT.keys()
    assert all(yaml.safe_load(english[name]) == yaml.safe_load(chinese[name]) for name in english)

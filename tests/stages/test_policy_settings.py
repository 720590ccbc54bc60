"""Settings of stages ppo and grpo reach what is learned: numbers made here, from the same answers, by the formulae of docs/rl.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.e2e.test_policy import LETTERS, answering, built  # noqa: F401 (a fixture)
from tunesmith.stages.policy import PolicyPeftTrainer
from tunesmith.types import Batch

GROUP = 4


def collected(trainer: PolicyPeftTrainer) -> tuple[list[Batch], torch.Tensor, torch.Tensor]:
    """A rollout, the reward of each answer by the function's own code, and whether it ended."""
    batches = trainer.collect(0, 0, range(4))
    names: dict[str, Any] = {}
    exec(LETTERS, names)  # the reward file of the fixture
    texts, ended = [], []
    for batch in batches:
        counts = batch.policy.row_S.bincount().tolist()  # type: ignore[union-attr]
        for ids in batch.targets_S.split(counts):
            texts.append(trainer.given.tokenizer.decode(ids, skip_special_tokens=True))
            ended.append(bool(ids[-1] == trainer.given.tokenizer.eos_token_id))
    return batches, torch.tensor(names["letters"](texts, texts)), torch.tensor(ended)


def of_answers(batches: Sequence[Batch], name: str) -> torch.Tensor:
    """A number of the first token of each answer, ``[R]``."""
    found = []
    for batch in batches:
        counts = batch.policy.row_S.bincount().tolist()  # type: ignore[union-attr]
        found += [values[0] for values in getattr(batch.policy, name).split(counts)]
    return torch.stack(found)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("clip", [None, 0.4])
@pytest.mark.parametrize("penalty", [0.0, 0.5])
def test_scores(answering: dict[str, Any], write_config: Any, norm: bool, clip: float | None, penalty: float) -> None:  # noqa: F811
    """Step 2. Without divergence, with gamma and lambda 1, what is to be expected at each token is the score of its answer."""
    options = {"score_norm": norm, "reward_clip": clip, "missing_eos_penalty": penalty, "kl_coef": 0, "gae_lambda": 1.0}
    options["max_new_tokens"] = 64  # some answers end by themselves
    batches, rewards, ended = collected(built(answering, write_config, **options))
    assert 0 < ended.sum() < len(ended)
    expected = rewards / (rewards.std() + 1e-4) if norm else rewards
    expected = expected.clamp(-0.4, 0.4) if clip else expected
    expected = torch.where(ended, expected, expected - penalty)
    torch.testing.assert_close(of_answers(batches, "returns_S"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_groups(answering: dict[str, Any], write_config: Any, baseline: str, scale: str) -> None:  # noqa: F811
    """Step 6 of GRPO."""
    options = {"stage": "grpo", "num_generations": GROUP, "scale_rewards": scale, "group_baseline": baseline}
    batches, rewards, _ = collected(built(answering, write_config, **options))
    groups = rewards.view(-1, GROUP)
    others = (
        (groups.sum(1, keepdim=True) - groups) / (GROUP - 1) if baseline == "leave_one_out" else groups.mean(1, keepdim=True)
    )
    deviation = {"group": groups.std(1, keepdim=True) + 1e-4, "batch": rewards.std() + 1e-4, "none": torch.ones(())}[scale]
    expected = ((groups - others) / deviation).flatten()
    torch.testing.assert_close(of_answers(batches, "advantages_S"), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("whiten", [True, False])
def test_advantages_are_whitened_if_asked(answering: dict[str, Any], write_config: Any, whiten: bool) -> None:  # noqa: F811
    batches, _, _ = collected(built(answering, write_config, whiten_advantages=whiten))
    advantages = torch.cat([batch.policy.advantages_S for batch in batches])  # type: ignore[union-attr]
    white = abs(advantages.mean()) < 1e-5 and abs(advantages.std() - 1) < 1e-4
    assert white == whiten


def test_the_coefficient_is_steered_to_its_target(answering: dict[str, Any], write_config: Any) -> None:  # noqa: F811
    """Step 11, of a rollout of 16 answers after the first has been learned from."""
    options = {"kl_control": "adaptive", "kl_coef": 0.2, "ppo_target": 1e4, "kl_horizon": 100.0}
    trainer = built(answering, write_config, **options)
    windows = trainer.loader.onward(0, 0, {})
    for _ in range(5):
        trainer.training_step(next(windows)[0])
    first = 0.2 * (1 - 0.2 * 16 / 100)  # no divergence yet: an error of -1, clipped
    assert trainer.control.coef == pytest.approx(first * (1 - 0.2 * 16 / 100), rel=1e-6)
    trainer = built(answering, write_config, **{**options, "ppo_target": 1e-9})
    for (batches, _), _ in zip(trainer.loader.onward(0, 0, {}), range(5), strict=False):
        trainer.training_step(batches)
    assert trainer.control.coef == pytest.approx(first * (1 + 0.2 * 16 / 100), rel=1e-6)

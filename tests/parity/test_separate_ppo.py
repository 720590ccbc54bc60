"""Stage ppo against an implementation with separate models, padded, of transformers and PEFT alone: same answers, same losses."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import ppo
from benchmarks.contenders.ours_ppo import OurPpo
from benchmarks.contenders.separate_ppo import SeparatePpo
from benchmarks.turns import Contender

from tests.conftest import make_rows
from tunesmith.model.adapter import head_of


@pytest.fixture
def reward(tiny_model: Path, tmp_path: Path) -> str:
    ppo.reward_adapter(str(tiny_model), tmp_path / "reward")
    return str(tmp_path / "reward")


def both(tiny_model: Path, reward: str, tmp_path: Path, **changes: Any) -> tuple[OurPpo, SeparatePpo]:
    """A rollout is 8 answers; of the 21 rows' prompts some are too long."""
    sizes = {"prompts": 4, "samples": 2, "new": 12, "epochs": 2, "batch": 4, "cutoff": 18, "steps": 2}
    unit = ppo.unit_of(argparse.Namespace(**{**sizes, "dtype": "fp32", "clock": "wall", "given": True, **changes}))
    rows = make_rows(21)
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    separate = SeparatePpo(str(tiny_model), reward, rows, unit)
    assert 8 <= sum(map(len, separate.rollouts)) < len(rows)
    return OurPpo(str(tiny_model), reward, tmp_path / "rows.json", unit, tmp_path / "run"), separate


def losses(iteration: dict[str, Any], *names: str) -> torch.Tensor:
    return torch.tensor([[update[name] for name in names] for update in iteration["losses"]], dtype=torch.float64)


@pytest.mark.parametrize("expecting", [False, True])
def test_the_first_update_is_the_same(tiny_model: Path, reward: str, tmp_path: Path, expecting: bool) -> None:
    """A head that expects something sends gradients into the trunk of the policy with us, into the critic's there."""
    ours, separate = both(tiny_model, reward, tmp_path)
    names = ["loss", "policy", "value", "entropy", "norm"]
    if expecting:
        names.remove("norm")
        head = head_of(ours.trainer.model).summary
        with torch.no_grad():
            head.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
            head.bias.fill_(0.2)
        separate.critic_head.load_state_dict(head.state_dict())
    mine, theirs = ours.iterate(), separate.iterate(0)
    found, expected = losses(mine, *names), losses(theirs, *names)
    assert found.shape == expected.shape == (4, len(names))
    assert (expected[0].abs() > 1e-3).all()
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    assert [mine[key] for key in ("tokens", "answers", "real")] == [theirs[key] for key in ("tokens", "answers", "real")]
    assert mine["positions"] < mine["real"] < theirs["positions"]


def test_without_a_loss_of_values_all_updates_are(
    tiny_model: Path, reward: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then no trunk learns from values. The second rollout is of a policy that has left the reference."""
    monkeypatch.setitem(ppo.SETTINGS, "vf_coef", 0.0)
    monkeypatch.setattr(ppo, "RATE", 5e-3)
    ours, separate = both(tiny_model, reward, tmp_path)
    for index in range(2):
        mine, theirs = ours.iterate(), separate.iterate(index)
        names = ("policy", "value", "entropy", "norm")
        torch.testing.assert_close(losses(mine, *names), losses(theirs, *names), rtol=1e-3, atol=1e-5)
    assert abs(ours.trainer.state.metrics["kl"][0]) > 1e-2
    assert ours.first == pytest.approx(separate.first, rel=1e-4, abs=1e-6) and mine["first"] is ours.first


def test_sampled_answers_end_where_they_end(tiny_model: Path, reward: str, tmp_path: Path) -> None:
    ours, separate = both(tiny_model, reward, tmp_path, given=False, new=40)
    mine, theirs = ours.iterate(), separate.iterate(0)
    for one in (mine, theirs):
        assert one["answers"] == 8 < one["tokens"] <= 8 * 40
        assert 0 < one["rollout"] < one["seconds"] == pytest.approx(one["rollout"] + one["scoring"] + one["updates"])
    end = separate.ends[0]
    assert separate.up_to_end([5, end, 7, end]) == [5, end] and separate.up_to_end([5, 7]) == [5, 7]


def test_times_are_compared_for_each_token() -> None:
    def answers(factor: float, *tokens: int) -> list[dict[str, Any]]:
        first = {"policy": 0.1 * factor, "value": 1.0}
        return [
            {"seconds": 10 * factor, "rollout": 5 * factor, "scoring": 2 * factor, "updates": 3 * factor, "tokens": count,
             "answers": 4, "losses": [first], "first": first, "real": 100, "positions": 100 * factor}
            for count in tokens
        ]  # fmt: skip

    one, two = Contender("ours", [], {}, answers(1, 50, 100)), Contender("other", [], {}, answers(3, 100, 100))
    ours, other = ppo.table([one, two], {"ours": 100.0, "other": 400.0}, given=False)
    assert other["ours_is_faster_by"] == other["rollout_faster_by"] == (1.5 + 3) / 2 and other["seconds"] == 30
    assert (ours["answers_per_second"], other["answers_per_second"]) == (0.4, 0.133)
    assert other["our_share_of_peak"] == 0.25 and other["positions_per_token"] == 3 and other["first_loss_gap"] is None
    assert set(ppo.HEADS) <= ours.keys()
    with pytest.raises(SystemExit, match="other was given other answers"):
        ppo.table([one, two], {"ours": 1.0, "other": 1.0}, given=True)
    two.answers = answers(3, 50, 100)
    assert ppo.table([one, two], {"ours": 1.0, "other": 1.0}, given=True)[1]["first_loss_gap"] == 0.2


@pytest.mark.slow
def test_the_command(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(make_rows(30)), encoding="utf-8")
    sizes = ["--prompts", "4", "--new", "8", "--steps", "1", "--cutoff", "100"]
    ppo.main(["--data", str(file), "--model", str(tiny_model), "--given", "--dtype", "fp32", *sizes])
    assert "| separate models |" in capsys.readouterr().out

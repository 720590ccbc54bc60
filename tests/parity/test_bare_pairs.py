"""Preferences and reward models against a padded loop of transformers and PEFT alone: same initialisation, same pairs."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
from benchmarks import ablation
from benchmarks.contenders.bare_pairs import LOOPS
from benchmarks.pairs import table
from benchmarks.turns import Contender

from tests.conftest import WORDS, tunesmith, write_dataset
from tests.parity.test_bare_loop import assert_equal, our_run
from tunesmith.config.load import load_config
from tunesmith.stages.run import build_trainer
from tunesmith.train.progress import SilentReporter

STEPS = 6


def make_pairs(count: int) -> list[dict[str, Any]]:
    """Pairs of very different lengths; the prompt of every seventh is longer than the cutoff of the tests."""
    rng = random.Random(0)

    def say(who: str, low: int, high: int) -> dict[str, str]:
        return {"from": who, "value": " ".join(rng.choices(WORDS, k=rng.randint(low, high)))}

    return [
        {
            "conversations": [say("human", 1, 12), say("gpt", 1, 12), say("human", *((120, 120) if i % 7 == 3 else (1, 60)))],
            "chosen": say("gpt", 1, 40),
            "rejected": say("gpt", 1, 40),
        }
        for i in range(count)
    ]


STAGES = {"dpo": {"truncation": "keep_start"}, "rm": {"truncation": "drop"}}


@pytest.fixture
def pairs(settings: dict[str, Any], tmp_path: Path) -> list[dict[str, Any]]:
    rows = make_pairs(60)
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
    write_dataset(tmp_path / "pairs", rows, formatting="sharegpt", ranking=True, columns=columns)
    settings.update(dataset_dir=str(tmp_path / "pairs"), cutoff_len=112, disable_shuffling=True, max_steps=STEPS)
    return rows


@pytest.mark.parametrize("stage", STAGES)
def test_steps_on_the_tiny_model(
    pairs: list[dict[str, Any]], settings: dict[str, Any], write_config: Any, tiny_model: Path, stage: str
) -> None:
    tunesmith("train", write_config({**settings, **STAGES[stage], "stage": stage}))
    loop = LOOPS[stage](str(tiny_model), pairs, batch=4, total_steps=STEPS, rate=1e-2, cutoff=112)
    assert 4 * STEPS <= sum(len(batch) // 2 for batch in loop.batches) < len(pairs)
    ours = our_run(Path(settings["output_dir"]))
    assert math.isclose(ours[0][0], math.log(2), rel_tol=1e-6)
    assert max(abs(loss - math.log(2)) for loss, _ in ours) > 0.01
    assert_equal(ours, [loop.step(index) for index in range(STEPS)])


@pytest.mark.parametrize("stage", STAGES)
def test_what_the_ablation_leaves_out_changes_no_loss(
    pairs: list[dict[str, Any]], settings: dict[str, Any], write_config: Any, stage: str
) -> None:
    config, _ = load_config(write_config({**settings, **STAGES[stage], "stage": stage}))
    trainer, _ = build_trainer(config, SilentReporter())
    trainer.model.eval()
    ablation.leave_the_start(trainer)
    (batch,) = next(iter(trainer.loader.windows(0)))
    assert batch.num_repeated

    def loss() -> float:
        return trainer.compute_loss(batch).sum.item() / batch.total_weight

    expected = loss()
    assert abs(expected - math.log(2)) > 1e-3
    for name, off in ablation.techniques_of(stage).items():
        back = off(trainer)
        without = loss()
        back()
        assert math.isclose(without, expected, rel_tol=1e-5), name
        assert loss() == expected, name


def test_what_is_computed_once_is_part_of_the_time() -> None:
    once = Contender("tunesmith", [], {"once": 6.0, "pairs": 12}, [{"seconds": s, "tokens": 100, "loss": 0.5} for s in (1, 3)])
    each = Contender("other", [], {}, [{"seconds": s, "tokens": 100, "loss": 0.4} for s in (8, 16)])
    ours, other = table([once, each], {"tunesmith": 100.0, "other": 400.0}, batch=2)
    assert (ours["pairs_per_second"], ours["updates_pairs_per_second"]) == (round(4 / 6, 3), 1.0)
    assert (other["pairs_per_second"], other["updates_pairs_per_second"]) == (round(4 / 24, 3), round(4 / 24, 3))
    assert other["ours_is_faster_by"] == (8 / 2 + 16 / 4) / 2 and other["updates_ours_is_faster_by"] == round(
        (8 + 16 / 3) / 2, 3
    )
    assert (other["our_share_of_peak"], other["largest_loss_gap"]) == (0.25, 0.25)
    each.answers[0]["tokens"] = 99
    with pytest.raises(SystemExit, match="other was given other rows"):
        table([once, each], {"tunesmith": 1.0, "other": 1.0}, batch=2)

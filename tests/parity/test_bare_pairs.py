"""Preferences and reward models against a padded loop of transformers and PEFT alone: same initialisation, same pairs."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
from benchmarks.contenders.bare_pairs import LOOPS

from tests.conftest import WORDS, tunesmith, write_dataset
from tests.parity.test_bare_loop import assert_equal, our_run

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


@pytest.mark.parametrize(("stage", "truncation"), [("dpo", "keep_start"), ("rm", "drop")])
def test_steps_on_the_tiny_model(
    settings: dict[str, Any], write_config: Any, tiny_model: Path, tmp_path: Path, stage: str, truncation: str
) -> None:
    rows = make_pairs(60)
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
    write_dataset(tmp_path / "pairs", rows, formatting="sharegpt", ranking=True, columns=columns)
    settings.update(dataset_dir=str(tmp_path / "pairs"), stage=stage, cutoff_len=112, truncation=truncation)
    settings.update(disable_shuffling=True, max_steps=STEPS, learning_rate=1e-2)
    tunesmith("train", write_config(settings))
    loop = LOOPS[stage](str(tiny_model), rows, batch=4, total_steps=STEPS, rate=1e-2, cutoff=112)
    assert 4 * STEPS <= sum(len(batch) // 2 for batch in loop.batches) < len(rows)
    ours = our_run(Path(settings["output_dir"]))
    assert math.isclose(ours[0][0], math.log(2), rel_tol=1e-6)
    assert max(abs(loss - math.log(2)) for loss, _ in ours) > 0.01
    assert_equal(ours, [loop.step(index) for index in range(STEPS)])

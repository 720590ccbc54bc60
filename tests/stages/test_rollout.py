"""Rollouts as batches: what is learned of an answer, in which order windows come, and that a file holds all of it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tunesmith.config.policy import RolloutSize
from tunesmith.data.collator import target_rows
from tunesmith.data.loader import DataLoader
from tunesmith.errors import CheckpointError
from tunesmith.stages.rewards import Answered
from tunesmith.stages.rollout import ROLLOUT, RolloutLoader, answers_batch, load_rollout, save_rollout
from tunesmith.types import Batch, Example, PolicyTargets, PromptExample, Source

END = 99
PROMPTS = 7
WALK = 14
"""Windows that are compared; an epoch has 3 to 12."""


def prompt(row: int) -> PromptExample:
    return PromptExample(np.arange(10, 13 + row % 3, dtype=np.int32), "", Source("set", "set.jsonl", row + 1, row + 1))


def answered(of: PromptExample, *ids: int) -> Answered:
    return Answered(of, np.array(ids, np.int32), "said", ids[-1] == END)


def taught(batch: Batch, seed: int, **left_out: None) -> Batch:
    """The batch with numbers of every kind, but for those that are left out."""
    torch.manual_seed(seed)
    numbers: dict[str, Any] = {
        name: torch.randn(batch.num_targets) for name in ("advantages_S", "old_S", "reference_S", "values_S")
    }
    numbers = {**numbers, "returns_S": torch.randn(batch.num_targets), "row_S": target_rows(batch), **left_out}
    return replace(batch, weights_S=torch.rand(batch.num_targets), total_weight=0.1 + seed, policy=PolicyTargets(**numbers))


def same(one: object, other: object) -> bool:
    """Equal to the bit, dtypes and all."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, Batch | PolicyTargets):
        return type(one) is type(other) and all(same(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))
    return type(one) is type(other) and one == other


# ---- batches


def test_all_of_an_answer_is_learned_and_nothing_of_the_prompt() -> None:
    first, second = prompt(0), prompt(1)  # of 3 and 4 tokens
    said = [answered(first, 5, 6, END), answered(first, 7), answered(first, END), answered(second, 8, 9)]
    batch = answers_batch(said)
    assert batch.lengths == (6, 4, 4, 6)
    rows = batch.input_ids_T.split(list(batch.lengths))
    assert [row.tolist()[:3] for row in rows] == [[10, 11, 12]] * 4
    assert batch.targets_S.tolist() == [5, 6, END, 7, END, 8, 9]
    assert batch.positions_S.tolist() == [2, 3, 4, 8, 12, 17, 18]  # each one before its target
    assert target_rows(batch).tolist() == [0, 0, 0, 1, 2, 3, 3]
    assert batch.begins_like == ((0, 0), (0, 3), (0, 3), (0, 0))  # as the first answer to the same prompt, for its whole length
    assert [source.row for source in batch.sources] == [1, 1, 1, 2]


# ---- windows


Seen = list[tuple[list[tuple[int, ...]], bool]]
"""Of each window: the answers of its micro-batches, and whether an epoch ends with it."""


def loader(
    samples: int = 2, size: int = 3, accumulation: int = 2, passes: int = 2, prompts: int = 4
) -> tuple[RolloutLoader, list[Any]]:
    """Rollouts of ``prompts`` of the seven prompts, whose answers name epoch, rollout, prompt and sample; and what was collected."""
    collected: list[Any] = []

    def collect(epoch: int, number: int, rows: Sequence[int]) -> list[Batch]:
        collected.append((epoch, number, list(rows)))
        said = [answered(prompt(row), epoch, number, row, sample) for row in rows for sample in range(samples)]
        return [taught(answers_batch(said[begin : begin + size]), begin) for begin in range(0, len(said), size)]

    examples = [Example(np.arange(3), np.arange(3), prompt(row).source) for row in range(PROMPTS)]
    sizes = RolloutSize(prompts, samples, size, accumulation, passes)
    return RolloutLoader(DataLoader(examples, prompts, seed=5), collect, sizes), collected


def seen(window: Sequence[Batch]) -> list[tuple[int, ...]]:
    return [tuple(batch.targets_S.tolist()) for batch in window]


def walk(of: RolloutLoader, count: int, place: dict[str, Any] | None = None) -> Seen:
    windows = of.onward(0, 0, place or {})
    return [(seen(window), ended) for window, ended in itertools.islice(windows, count)]


def test_every_pass_has_all_answers_of_a_rollout() -> None:
    """Rollouts of 4 and of 3 prompts: 8 and 6 answers, 3 and 2 micro-batches of at most 3, 2 and 1 updates, twice."""
    made, collected = loader()
    assert len(made) == 2 * 2 + 2 * 1
    windows = walk(made, 2 * len(made))
    assert [len(window) for window, _ in windows] == [2, 1, 2, 1, 2, 2] * 2
    assert [ended for _, ended in windows] == [False, False, False, False, False, True] * 2
    assert [(epoch, number, len(rows)) for epoch, number, rows in collected] == [(0, 0, 4), (0, 1, 3), (1, 0, 4), (1, 1, 3)]
    for epoch in (0, 1):
        assert sorted(row for of, _, rows in collected if of == epoch for row in rows) == list(range(PROMPTS))
    first, again = windows[0][0] + windows[1][0], windows[2][0] + windows[3][0]
    assert sorted(first) == sorted(again)  # the same micro-batches, so that ratios are of the same arithmetic
    assert collected[0][2] != collected[2][2] or collected[1][2] != collected[3][2]  # another order in the next epoch


@pytest.mark.parametrize("shape", [{}, {"passes": 1}, {"samples": 1, "size": 2, "accumulation": 1, "passes": 3, "prompts": 5}])
def test_it_goes_on_from_every_position(shape: dict[str, int], tmp_path: Path) -> None:
    whole = walk(loader(**shape)[0], WALK)
    for done in range(1, WALK - 1):
        before, _ = loader(**shape)
        walk(before, done)
        if before.at.update:
            save_rollout(before.batches, tmp_path)
        after, collected = loader(**shape)
        if before.at.update:
            after.batches = load_rollout(tmp_path)
        assert walk(after, WALK - done, before.place()) == whole[done:], done
        here = (before.at.epoch, before.at.rollout)
        assert (here not in [one[:2] for one in collected]) == bool(before.at.update), (
            "a rollout that is begun is not collected again"
        )


def test_a_rollout_that_is_left_is_followed_by_the_next() -> None:
    made, collected = loader()
    windows = made.onward(0, 0, {})
    next(windows)
    made.leave()
    assert made.place() == {"epoch": 0, "rollout": 1, "update": 0}
    next(windows)
    assert [one[:2] for one in collected] == [(0, 0), (0, 1)]
    made.leave()
    assert made.place() == {"epoch": 1, "rollout": 0, "update": 0}
    assert made.passes(0, 0) == 1.0


def test_leaving_after_the_last_update_skips_no_rollout() -> None:
    made, collected = loader()
    windows = made.onward(0, 0, {})
    for _ in range(4):  # all of the first rollout
        next(windows)
    made.leave()
    next(windows)
    assert [one[:2] for one in collected] == [(0, 0), (0, 1)]


def test_how_far_it_is() -> None:
    made, _ = loader()
    found = []
    for _ in zip(made.onward(0, 0, {}), range(6), strict=False):
        found.append(made.passes(0, 0))
    assert found == [0.125, 0.25, 0.375, 0.5, 0.75, 1.0]


# ---- the file


def test_a_rollout_comes_back_as_it_was(tmp_path: Path) -> None:
    first, second = prompt(0), prompt(2)
    whole = taught(answers_batch([answered(first, 5, 6, END), answered(first, 7)]), 1)
    lone = taught(answers_batch([answered(second, 8)]), 2, old_S=None, reference_S=None, values_S=None, returns_S=None)
    plain = replace(
        taught(answers_batch([answered(second, 9)]), 3), weights_S=None, sources=(Source("set", "数据/行.jsonl", 3, 0),)
    )
    batches = [whole, lone, plain]
    save_rollout(batches, tmp_path)
    found = load_rollout(tmp_path)
    assert len(found) == len(batches)
    for one, other in zip(batches, found, strict=True):
        assert same(one, other)
    assert not same(whole, replace(whole, total_weight=1.0)) and not same(whole, lone)  # it can tell


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    save_rollout([taught(answers_batch([answered(prompt(0), 5, END)]), 1)], tmp_path)
    data = (tmp_path / ROLLOUT).read_bytes()
    (tmp_path / ROLLOUT).write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"rollout\.safetensors: cannot be read"):
        load_rollout(tmp_path)

"""Answers collected at one time, as batches that are learned from several times; and where a run stands in them.

A rollout is divided into micro-batches once. Its log-probabilities are computed, and later learned from, in these same batches,
so that before the first update the ratio of a token's probabilities is exactly 1, whatever is computed in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tunesmith.config.policy import RolloutSize
from tunesmith.data.collator import collate
from tunesmith.data.loader import DataLoader, Window
from tunesmith.errors import CheckpointError
from tunesmith.stages.rewards import Answered
from tunesmith.types import IGNORE_INDEX, Batch, Example, PolicyTargets, Source

ROLLOUT = "rollout.safetensors"
_TENSORS = ("input_ids_T", "position_ids_T", "positions_S", "targets_S", "weights_S")


def answers_batch(answers: Sequence[Answered]) -> Batch:
    """Prompts with their answers, of which every token is learned; answers to one prompt share what they begin with."""
    first: dict[int, int] = {}
    begins = []
    for row, answer in enumerate(answers):
        earlier = first.setdefault(id(answer.prompt), row)
        begins.append((earlier, len(answer.prompt.input_ids)) if earlier != row else (0, 0))
    return replace(collate([_example(answer) for answer in answers]), begins_like=tuple(begins))


def _example(answer: Answered) -> Example:
    prompt = answer.prompt.input_ids
    labels = np.concatenate([np.full(len(prompt), IGNORE_INDEX, np.int32), answer.ids])
    return Example(np.concatenate([prompt, answer.ids]), labels, answer.prompt.source)


Collect = Callable[[int, int, Sequence[int]], list[Batch]]
"""(pass over the prompts, number of the rollout in it, rows of the prompts) -> micro-batches with what they teach."""


@dataclass
class Place:
    """Where the next update begins.

    Attributes:
        epoch: passes over the prompts.
        rollout: number of the rollout in this one.
        update: updates of that rollout that are done.
    """

    epoch: int = 0
    rollout: int = 0
    update: int = 0


class RolloutLoader:
    """Windows of micro-batches from rollouts that are collected as they are needed.

    Args:
        prompts: the rows, in windows that are the prompts of a rollout.
        collect: makes the micro-batches of a rollout.
        size: of a rollout and of what is made of it.
    """

    report = None
    """Rows are counted when they are prepared, not here."""

    def __init__(self, prompts: DataLoader, collect: Collect, size: RolloutSize) -> None:
        self.prompts = prompts
        self.batches: list[Batch] = []
        """Of the rollout that is being learned from."""
        self.at = Place()
        self._collect, self._size = collect, size

    def __len__(self) -> int:
        """Updates in a pass over the prompts, if no rollout is left early."""
        return self._size.updates_per_epoch(self.rows)

    def _rows(self, epoch: int, number: int) -> list[int]:
        """Numbers of the prompts of a rollout."""
        count = self.prompts.batch_size
        rows: list[int] = self.prompts.order(epoch)[number * count : (number + 1) * count].tolist()
        return rows

    def onward(self, epoch: int, window: int, place: Mapping[str, Any]) -> Generator[Window]:
        """Windows from a position on, without end.

        Args:
            epoch: as the loop counts; ``place`` is more exact.
            window: the same.
            place: what ``place`` returned there; empty at the beginning.
        """
        self.at = Place(**place)
        while True:
            here = replace(self.at)
            if not here.update:
                self.batches = self._collect(here.epoch, here.rollout, self._rows(here.epoch, here.rollout))
            windows = self._windows(here)
            for number in range(here.update, len(windows)):
                self.at = replace(here, update=number + 1)
                if number + 1 == len(windows):
                    self.leave()
                yield windows[number], self.at.epoch > here.epoch
                if self.at.rollout != here.rollout or self.at.epoch != here.epoch:
                    break

    def leave(self) -> None:
        """Go on with the next rollout, unless the last update has ended this one already."""
        if not self.at.update:
            return
        following = replace(self.at, rollout=self.at.rollout + 1, update=0)
        ended = following.rollout == len(self.prompts)
        self.at = Place(following.epoch + 1) if ended else following

    def _windows(self, here: Place) -> list[list[Batch]]:
        """The updates of a rollout: in each pass the same micro-batches, in another order."""
        found = []
        for number in range(self._size.passes):
            order = np.arange(len(self.batches))
            if number:
                order = np.random.default_rng([self.prompts.seed, here.epoch, here.rollout, number]).permutation(order)
            some = [self.batches[i] for i in order.tolist()]
            count = self._size.accumulation
            found += [some[begin : begin + count] for begin in range(0, len(some), count)]
        return found

    def place(self) -> dict[str, Any]:
        """Where the next update begins."""
        return vars(self.at).copy()

    def passes(self, epoch: int, window: int) -> float:
        """How often the prompts have been passed over."""
        within = self.at.update / self._size.updates(len(self._rows(self.at.epoch, self.at.rollout)))
        return self.at.epoch + (self.at.rollout + within) / len(self.prompts)

    @property
    def rows(self) -> int:
        """Prompts."""
        return self.prompts.rows


# ---- the file


def save_rollout(batches: Sequence[Batch], folder: Path) -> None:
    """Write the micro-batches of a rollout that is not yet done with."""
    tensors: dict[str, torch.Tensor] = {}
    facts = []
    for number, batch in enumerate(batches):
        assert batch.policy is not None
        kept = {name: getattr(batch, name) for name in _TENSORS} | batch.policy.tensors()
        tensors |= {f"{number}.{name}": tensor.contiguous() for name, tensor in kept.items() if tensor is not None}
        facts.append(
            {
                "lengths": batch.lengths,
                "sources": [[source.dataset, source.file, source.row, source.line] for source in batch.sources],
                "begins_like": batch.begins_like,
                "total_weight": batch.total_weight,
            }
        )
    save_file(tensors, folder / ROLLOUT, metadata={"batches": json.dumps(facts)})


def load_rollout(folder: Path) -> list[Batch]:
    """What ``save_rollout`` wrote. Raises CheckpointError when it cannot be read."""
    try:
        with safe_open(folder / ROLLOUT, "pt") as file:
            facts = json.loads(file.metadata()["batches"])
            tensors: list[dict[str, torch.Tensor]] = [{} for _ in facts]
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                number, _, name = key.partition(".")
                tensors[int(number)][name] = file.get_tensor(key)
        return [_batch(fact, held) for fact, held in zip(facts, tensors, strict=True)]
    except (OSError, SafetensorError, KeyError, IndexError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / ROLLOUT}: cannot be read: {error}") from None


def _batch(fact: Mapping[str, Any], held: dict[str, torch.Tensor]) -> Batch:
    own: dict[str, Any] = {name: held.pop(name) for name in _TENSORS if name in held}
    return Batch(
        **own,
        lengths=tuple(fact["lengths"]),
        sources=tuple(Source(*source) for source in fact["sources"]),
        begins_like=tuple((row, tokens) for row, tokens in fact["begins_like"]),
        total_weight=fact["total_weight"],
        policy=PolicyTargets(**held),
    )

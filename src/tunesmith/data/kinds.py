"""Stored rows as a stage takes them: pairs, feedback, prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from tunesmith.data.lazy import Lazy
from tunesmith.data.learned import Learned
from tunesmith.data.selection import Selection
from tunesmith.data.sniff import Target
from tunesmith.types import FeedbackExample, PairExample, PromptExample

K = TypeVar("K")


class Kind(NamedTuple, Generic[K]):
    """How stored rows make one of what a stage takes.

    Attributes:
        name: what is needed of a raw row.
        size: stored rows for each.
        make: of that many stored rows.
    """

    name: Target
    size: int
    make: Callable[..., K]


def pair_of(better: Learned, worse: Learned) -> PairExample:
    """Both answers to a prompt."""
    assert better.good
    assert not worse.good
    assert better.source == worse.source, (better.source, worse.source)
    common = common_tokens(better.ids, worse.ids)
    return PairExample(better.example(), worse.example(), better.source, common=common, margin=better.margin)


def common_tokens(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens two rows begin with alike, the last one of the shorter row not counted.

    Found on token ids, wherever the texts begin to differ: a prompt's end may be another token with another answer behind it.

    Example:
        ``[5, 6, 7]`` and ``[5, 6, 8, 9]`` -> 2; ``[5, 6]`` and ``[5, 6]`` -> 1.
    """
    most = min(len(one), len(other)) - 1
    differing = np.flatnonzero(one[:most] != other[:most])
    return int(differing[0]) if len(differing) else max(most, 0)


def feedback_of(row: Learned) -> FeedbackExample:
    """A dialogue with the verdict on its last turn."""
    return FeedbackExample(row.example(), row.good, row.source)


def prompt_of(row: Learned) -> PromptExample:
    """A prompt with its turns and with the answer that the data give."""
    return PromptExample(row.ids, row.reference, row.source, row.messages, row.tools)


PAIR: Kind[PairExample] = Kind("pair", 2, pair_of)
FEEDBACK: Kind[FeedbackExample] = Kind("feedback", 1, feedback_of)
PROMPT: Kind[PromptExample] = Kind("prompt", 1, prompt_of)
KINDS: Mapping[Target, Kind[Any]] = {kind.name: kind for kind in (PAIR, FEEDBACK, PROMPT)}
"""By what is needed of a raw row."""


class Rows(Lazy[K]):
    """A selection, read as rows of a kind.

    Args:
        selection: in which the rows that belong together follow each other.
        kind: what they make.
    """

    def __init__(self, selection: Selection, kind: Kind[K]) -> None:
        assert len(selection) % kind.size == 0, (len(selection), kind)
        self.selection = selection
        self.kind = kind

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each, of a pair those of both sides, int64 ``[N]``."""
        summed: np.ndarray = self.selection.lengths.reshape(-1, self.kind.size).sum(axis=1)
        return summed

    @property
    def supervised(self) -> int:
        """Tokens of the answers."""
        return self.selection.supervised

    def __len__(self) -> int:
        return len(self.selection) // self.kind.size

    def item(self, index: int) -> K:
        """A row of the kind."""
        first = index * self.kind.size
        return self.kind.make(*(self.selection.learned(first + i) for i in range(self.kind.size)))

    def fingerprint(self) -> str:
        """SHA-256 of the rows and the kind."""
        return hashlib.sha256(f"{self.selection.fingerprint()} {self.kind.name}".encode()).hexdigest()

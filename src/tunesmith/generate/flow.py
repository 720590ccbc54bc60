"""Requests in, tokens out: in each step every active row says one token, rows that are done leave, waiting ones join.

A batch of prompts and a server that answers as questions come need the same thing; ``batch.py`` is the first of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from tunesmith.config.arguments import GeneratingArguments
from tunesmith.generate.cache import RowCache
from tunesmith.generate.sampling import choose, stream
from tunesmith.generate.steps import Steps

_PROMPT_TOKENS = 8192
"""Tokens of prompts that are computed at once, unless one has more."""


@dataclass(frozen=True)
class Answer:
    """What a row said.

    Attributes:
        ids: int32 ``[n]``, the end token included if it ended.
        ended: whether an end token came; otherwise there was no more room.
    """

    ids: np.ndarray
    ended: bool


@dataclass(frozen=True)
class Request:
    """A prompt to be answered.

    Attributes:
        ids: int array, the prompt; at least one token.
        args: how to answer.
        keys: one for each sample, names of their random numbers.
        room: new tokens of each sample, at most.
        seed: of the random numbers.
    """

    ids: np.ndarray
    args: GeneratingArguments
    keys: tuple[tuple[int, ...], ...]
    room: int
    seed: int = 0


@dataclass(frozen=True)
class Said:
    """A token of a row.

    Attributes:
        request: number that ``add`` gave.
        sample: which of its samples.
        token: what came.
        answer: all of it, if this was the last token.
    """

    request: int
    sample: int
    token: int
    answer: Answer | None


@dataclass
class Statistics:
    """What was done so far.

    Attributes:
        tokens: that were generated.
        prompt_tokens: of prompts, that were computed; a prompt with several samples counts once.
        seconds: that it took.
        repaired: rows whose scores were no numbers, counted in each step.
        most_rows: that were active at the same time.
    """

    tokens: int = 0
    prompt_tokens: int = 0
    seconds: float = 0.0
    repaired: int = 0
    most_rows: int = 0


@dataclass
class _Row:
    number: int
    sample: int
    request: Request
    draws: np.random.Generator
    said: list[int] = field(default_factory=list)
    damaged: bool = False

    def tokens(self, length: int) -> np.ndarray:
        """Prompt and answer, filled up with the first token."""
        known = np.concatenate([self.request.ids, np.array(self.said, dtype=np.int64)])
        return np.pad(known, (0, length - len(known)), constant_values=known[0])


class Flow:
    """Generates for requests that come and go. Call ``step`` within ``Steps.running``.

    Args:
        steps: the model.
        end_ids: tokens that end an answer.
        slots: rows that are active at the same time, at most.
        longest: tokens of a row, prompt and answer, at most.
        statistics: added to.
    """

    def __init__(
        self, steps: Steps, end_ids: Sequence[int], slots: int, longest: int, statistics: Statistics | None = None
    ) -> None:
        self.statistics = statistics if statistics is not None else Statistics()
        self._steps, self._ends, self._slots = steps, frozenset(end_ids), slots
        self._cache = RowCache(slots, longest)
        self._waiting: deque[tuple[int, Request, range]] = deque()
        self._rows: list[_Row] = []
        self._requests = 0

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._rows or self._waiting)

    def add(self, request: Request) -> int:
        """Put a request behind those that wait; returns its number. Samples join together, as many as there are slots."""
        number, count = self._requests, len(request.keys)
        self._requests += 1
        for first in range(0, count, self._slots):
            self._waiting.append((number, request, range(first, min(first + self._slots, count))))
        return number

    def cancel(self, number: int) -> None:
        """Forget a request; its rows say nothing more."""
        self._waiting = deque(one for one in self._waiting if one[0] != number)
        for place in reversed(range(len(self._rows))):
            if self._rows[place].number == number:
                self._leave(place)

    def step(self) -> list[Said]:
        """One token of each active row, the first one of those that join included."""
        said = []
        if self._rows:
            logits_BV = self._steps.next(self._cache, [row.said[-1] for row in self._rows])
            said += self._say(0, logits_BV)
        joining = self._joining()
        if joining:
            prompts, counts = [request.ids for _, request, _ in joining], [len(samples) for *_, samples in joining]
            logits_PV = self._steps.prompts(self._cache, prompts, counts)
            first = len(self._rows)
            for number, request, samples in joining:
                self._rows += [_Row(number, i, request, stream(request.seed, request.keys[i])) for i in samples]
            self.statistics.prompt_tokens += sum(map(len, prompts))
            self.statistics.most_rows = max(self.statistics.most_rows, len(self._rows))
            said += self._say(first, logits_PV.repeat_interleave(torch.tensor(counts, device=logits_PV.device), 0))
        return said

    def _joining(self) -> list[tuple[int, Request, range]]:
        """Those of the waiting that there is room for, in their order."""
        found: list[tuple[int, Request, range]] = []
        free, tokens = self._slots - len(self._rows), 0
        while self._waiting and len(self._waiting[0][2]) <= free:
            tokens += len(self._waiting[0][1].ids)
            if found and tokens > _PROMPT_TOKENS:
                break
            found.append(self._waiting.popleft())
            free -= len(found[-1][2])
        return found

    def _say(self, first: int, logits_BV: torch.Tensor) -> list[Said]:
        """Choose a token of each row from the ``first`` on; rows that are done leave."""
        tokens = self._choose(self._rows[first:], logits_BV)
        said = []
        for place in reversed(range(first, len(self._rows))):
            row, token = self._rows[place], tokens[place - first]
            row.said.append(token)
            ended = token in self._ends
            answer = None
            if ended or len(row.said) == row.request.room:
                answer = Answer(np.array(row.said, dtype=np.int32), ended)
                self._leave(place)
            said.append(Said(row.number, row.sample, token, answer))
        self.statistics.tokens += len(said)
        return said[::-1]

    def _choose(self, rows: Sequence[_Row], logits_BV: torch.Tensor) -> list[int]:
        """A token of each row; rows that are answered alike are chosen for together."""
        found = [0] * len(rows)
        alike: dict[GeneratingArguments, list[int]] = {}
        for place, row in enumerate(rows):
            alike.setdefault(row.request.args, []).append(place)
        for args, places in alike.items():
            chosen = [rows[place] for place in places]
            mine_BV = logits_BV if len(alike) == 1 else logits_BV[torch.tensor(places, device=logits_BV.device)]
            before_BL = None
            if args.repetition_penalty != 1.0:
                longest = max(len(row.request.ids) + len(row.said) for row in chosen)
                before_BL = torch.from_numpy(np.stack([row.tokens(longest) for row in chosen])).to(logits_BV.device)
            tokens_B, repaired_B = choose(mine_BV, args, [row.draws for row in chosen], before_BL)
            for place, token, repaired in zip(places, tokens_B.tolist(), repaired_B.tolist(), strict=True):
                found[place] = token
                rows[place].damaged |= repaired
                self.statistics.repaired += repaired
        return found

    def _leave(self, place: int) -> None:
        self._cache.drop(place, wipe=self._rows[place].damaged or self._rows[-1].damaged)
        self._rows[place] = self._rows[-1]
        self._rows.pop()

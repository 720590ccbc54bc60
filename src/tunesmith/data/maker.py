"""What all makers of tokenised rows share: rendering, certificates, remarks, and rows that are too long.

A row goes through three steps. ``render`` and ``finish`` need Python's lock, tokenising between them (``TextEncoder.run``)
does not; so while one chunk of rows is tokenised the next can be rendered.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Generic, NamedTuple, Protocol, TypeVar

from tunesmith.data.learned import Learned
from tunesmith.data.report import DataReport, Kind
from tunesmith.data.template import ChatTemplate, Rendered
from tunesmith.data.thinking import LEFT_OUT, is_off, without_reasoning
from tunesmith.data.tokenize import LOST, Job, Text, TextEncoder, Tokens
from tunesmith.data.truncate import Truncation
from tunesmith.errors import TemplateError
from tunesmith.types import Message, Source

_SEVERAL = "the template shows earlier turns otherwise than when they were the last; each is learned in its own rendering"
_JOINED = "a token joins the prompt and the beginning of a reply; it is not learned"
_GUARDED = "the text spells a special token, which is read as ordinary text"


class Sourced(Protocol):
    """Anything that comes from a row."""

    @property
    def source(self) -> Source:
        """Which one."""


T = TypeVar("T", bound=Sourced)
Row = TypeVar("Row", bound=Sourced, contravariant=True)
Made = TypeVar("Made")
Views = list[Rendered]


class Maker(Protocol[Row, Made]):
    """Makes tokenised rows of converted ones."""

    encoder: TextEncoder

    def render(self, row: Row, report: DataReport) -> Made | None:
        """What is to be tokenised of a row; None, and counted, where there is nothing."""

    def plan(self, rendered: Sequence[Made]) -> Job:
        """The texts of many rows, to be tokenised together."""

    def finish(self, rendered: Sequence[Made], tokens: Iterable[Tokens], report: DataReport) -> list[Learned]:
        """Tokens and masks of many rows; every row is counted."""


class Limits(NamedTuple):
    """Longest example in tokens, and what becomes of longer ones."""

    cutoff_len: int
    truncation: Truncation


class DialogueMaker(ABC, Generic[T]):
    """Base of the makers whose rows are rendered by a chat template.

    Args:
        template: renders.
        limits: on length.

    Attributes:
        encoder: tokenises.
        renderings: how many a row has where the template never rewrites a turn.
        learns_prompt: whether all of a row's last rendering is learned, not its turns alone.
    """

    renderings = 1
    learns_prompt = False

    def __init__(self, template: ChatTemplate, limits: Limits) -> None:
        self.template = template
        self.encoder = template.encoder
        self.limits = limits
        self._answers_alone = is_off(template)

    # ---- what differs

    @abstractmethod
    def views(self, row: T) -> Views:
        """The renderings of a row, at least one. Raises TemplateError when they cannot be certified."""

    @abstractmethod
    def learned(self, row: T, views: Views, tokens: Sequence[Tokens]) -> list[Learned]:
        """The tokenised renderings."""

    @abstractmethod
    def without_oldest(self, row: T, fits: Callable[[T], bool]) -> T | None:
        """As much of the end of a row as fits, its answer whole; None if nothing does (truncation ``keep_end``)."""

    def trainable(self, made: list[Learned]) -> list[Learned]:
        """Those of a row's renderings from which something is learned; none, and the row is left out."""
        return [one for one in made if one.supervised]

    # ---- the three steps

    def render(self, row: T, report: DataReport) -> tuple[T, Views] | None:
        """The views of a row; None, and counted, where they cannot be certified."""
        if self._answers_alone and (answers := without_reasoning(row)) != row:
            report.add("note", "reasoning", LEFT_OUT, row.source)
            row = answers
        try:
            return row, self.views(row)
        except TemplateError as error:
            fix = "Mend the row, or use a template that can show it."
            report.add("uncertified", "uncertified", str(error), row.source, fix)
            return None

    def plan(self, rendered: Sequence[tuple[T, Views]]) -> Job:
        """The texts of many rows."""
        return self.encoder.plan([_text(view) for _, views in rendered for view in views])

    def finish(self, rendered: Sequence[tuple[T, Views]], tokens: Iterable[Tokens], report: DataReport) -> list[Learned]:
        """Tokens and masks of many rows."""
        stream, limit = iter(tokens), self.limits.cutoff_len
        kept: list[Learned] = []
        for row, views in rendered:
            own = list(islice(stream, len(views)))
            self._remark(row, views, own, report)
            made = self.learned(row, views, own)
            if max(len(one.ids) for one in made) > limit:
                made = self._shorten(row, made, report)
            elif not (made := self.trainable(made)):
                _left_out(report, row, "nothing-to-learn", "no trainable token")
            report.kept += bool(made)
            kept += made
        report.tokens += sum(len(one.ids) for one in kept)
        report.supervised += sum(one.supervised for one in kept)
        return kept

    def _remark(self, row: T, views: Views, tokens: Sequence[Tokens], report: DataReport) -> None:
        remarks = [note for view in views for note in view.notes]
        if len(views) > self.renderings:
            remarks.append(_SEVERAL)
        for made in tokens:
            remarks += [LOST] * made.lost
            if made.joined or made.guarded:
                learned = self.learns_prompt and made is tokens[-1]  # such a token begins in the prompt
                remarks += [_JOINED] * (made.joined and not learned) + [_GUARDED] * made.guarded
        for remark in dict.fromkeys(remarks):
            report.add("note", "template", remark, row.source)

    # ---- rows that are too long

    def _shorten(self, row: T, made: list[Learned], report: DataReport) -> list[Learned]:
        """What is learned of a row of which some rendering is too long; the row is counted as cut or as left out."""
        limit, truncation = self.limits
        if truncation in ("error", "drop"):
            kind: Kind = "uncertified" if truncation == "error" else "dropped"
            fix = "Raise cutoff_len, shorten the row, or choose another truncation." if kind == "uncertified" else ""
            report.add(kind, "too-long", f"longer than cutoff_len {limit}", row.source, fix)
            return []
        if truncation == "keep_end":
            shorter = self.without_oldest(row, self._fits)
            shortened = [] if shorter is None else self._made(shorter) or []
            how, why = "oldest turns, or the head of the question, left out", "the answer alone is too long"
        elif truncation == "keep_start":
            shortened = [one.part(0, limit) for one in made]
            how, why = "end cut off and not learned", "no answer token is left"
        else:
            shortened = [one.part(i, i + limit) for one in made for i in range(0, len(one.ids), limit)]
            how, why = "split into several", "no answer token is left"
        kept = self.trainable(shortened)
        if kept:
            report.add("cut", "truncated", f"longer than cutoff_len {limit}: {how}", row.source)
        else:
            _left_out(report, row, "too-long", f"longer than cutoff_len {limit}, and {why}")
        return kept

    def _fits(self, row: T) -> bool:
        limit = self.limits.cutoff_len
        made = self._made(row, limit * self.encoder.longest_token)
        return made is not None and all(len(one.ids) <= limit for one in made)

    def _made(self, row: T, most: float = math.inf) -> list[Learned] | None:
        """The tokenised renderings of one row; None where the template refuses it, or one has more than ``most`` characters."""
        try:
            views = self.views(row)
        except TemplateError:
            return None
        if any(len(view.text) > most for view in views):
            return None
        return self.learned(row, views, self.encoder.encode([_text(view) for view in views]))


def make_all(maker: Maker[Row, Made], rows: Iterable[Row], report: DataReport, chunk: int = 1000) -> Iterator[Learned]:
    """Tokenised rows, made in memory, a chunk at a time."""
    stream = iter(rows)
    while batch := list(islice(stream, chunk)):
        rendered = [one for row in batch if (one := maker.render(row, report)) is not None]
        job = maker.plan(rendered)
        yield from maker.finish(rendered, maker.encoder.locate(job, maker.encoder.run(job)), report)


def learned_of(messages: Sequence[Message], view: Rendered, tokens: Tokens, source: Source) -> Learned:
    """The tokens of a view, its turns with the weights of their messages."""
    turns = zip(view.turns, tokens.spans, strict=True)
    return Learned(tokens.ids, tuple([(start, end, messages[turn.index].weight) for turn, (start, end) in turns]), source)


def _text(view: Rendered) -> Text:
    return Text(view.text, tuple([(turn.start, turn.end) for turn in view.turns]), view.data)


def _left_out(report: DataReport, row: Sourced, code: str, message: str) -> None:
    report.add("dropped", code, message, row.source, "Raise cutoff_len, or shorten the row.")

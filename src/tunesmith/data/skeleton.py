"""What a template writes around the messages of conversations of one shape, learned once and compared for each row.

A row of a known shape is rendered plainly. If the text is the skeleton with the row's own texts in it, the turns
follow by counting characters, and if the prompts for its turns are the text up to them, they are what serving sees.
Nothing is taken on trust: what does not compare equal is traced like a row of a new shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tunesmith.data.dialogue import Dialogue
from tunesmith.data.trace import TracedStr
from tunesmith.data.turns import Turn
from tunesmith.data.wire import CONTENT, FIELDS, REASONING
from tunesmith.types import Message

Trim = Callable[[str], str]
Shape = tuple[tuple[str, bool, bool], ...]


def _whole(text: str) -> str:
    return text


_TRIMS: tuple[Trim, ...] = (_whole, str.strip, str.lstrip, str.rstrip)


@dataclass(frozen=True, slots=True)
class Piece:
    """A text of a message in a rendering.

    Attributes:
        index: number of the message.
        is_reasoning: whether it is the reasoning, not the content.
        trim: what the template does to it.
        known: whether ``trim`` was seen at work; other trims would have done the same so far.
        literal: the template's own text before it.
    """

    index: int
    is_reasoning: bool
    trim: Trim
    known: bool
    literal: str


@dataclass(frozen=True, slots=True)
class TurnPlan:
    """A turn, placed by the pieces at which it begins and ends.

    Attributes:
        index: number of its message.
        first: the piece whose beginning is nearest.
        start: characters from the beginning of that piece, mostly negative.
        last: the piece whose end is nearest.
        end: characters from the end of that piece.
        ended: as in ``Turn``.
        checked: whether the prompt and the final form are rendered to compare.
    """

    index: int
    first: int
    start: int
    last: int
    end: int
    ended: bool
    checked: bool


@dataclass(frozen=True, slots=True)
class Skeleton:
    """One rendering of a shape: the first ``count`` messages, the texts in it, the turns learned there."""

    count: int
    pieces: tuple[Piece, ...]
    closing: str
    turns: tuple[TurnPlan, ...]
    notes: tuple[str, ...]


def shape_of(messages: Sequence[Message]) -> Shape | None:
    """What decides the template's own text, as far as can be told from outside; None for rows with tools or names."""
    shape = []
    for message in messages:
        if message.tool_calls or message.name is not None or message.tool_call_id is not None or not message.content.strip():
            return None
        reasoning = message.reasoning
        if reasoning is not None and not reasoning.strip():
            return None
        shape.append((message.role, reasoning is not None, message.weight > 0))
    return tuple(shape)


def learn(
    text: TracedStr, messages: Sequence[Message], turns: Sequence[Turn], notes: tuple[str, ...], checked: set[int]
) -> Skeleton | None:
    """The skeleton of a rendering, or None if it is not made of whole texts, or not every turn is as served."""
    if not all(turn.served and turn.ended for turn in turns):
        return None
    plain = str.__str__(text)
    pieces: list[Piece] = []
    position = 0
    for span in text.spans:
        index, field = divmod(span.origin, FIELDS)
        if span.origin < 0 or field not in (CONTENT, REASONING) or span.start < position:
            return None
        source = messages[index].content if field == CONTENT else messages[index].reasoning or ""
        trim = _trim(source, plain[span.start : span.end])
        if trim is None:
            return None
        known = source != source.strip()
        pieces.append(Piece(index, field == REASONING, trim, known, plain[position : span.start]))
        position = span.end
    plans = [_plan(turn, text, turn.index in checked) for turn in turns]
    if any(plan is None for plan in plans):
        return None
    return Skeleton(len(messages), tuple(pieces), plain[position:], tuple(p for p in plans if p is not None), notes)


def _trim(source: str, shown: str) -> Trim | None:
    fitting = [trim for trim in _TRIMS if trim(source) == shown]
    return fitting[0] if fitting else None


def _plan(turn: Turn, text: TracedStr, checked: bool) -> TurnPlan | None:
    own = [n for n, span in enumerate(text.spans) if turn.start < span.end <= turn.end]
    if not own:
        return None
    first, last = text.spans[own[0]], text.spans[own[-1]]
    if turn.start > first.start:
        return None
    return TurnPlan(turn.index, own[0], turn.start - first.start, own[-1], turn.end - last.end, turn.ended, checked)


def with_known_trims(new: Skeleton, old: Skeleton | None) -> Skeleton:
    """``new``, with the trims that ``old`` knew where the new row did not show them."""
    if old is None or len(old.pieces) != len(new.pieces):
        return new
    pieces = tuple(b if b.known and not a.known else a for a, b in zip(new.pieces, old.pieces, strict=True))
    same = all(a.literal == b.literal and a.index == b.index for a, b in zip(new.pieces, old.pieces, strict=True))
    return Skeleton(new.count, pieces, new.closing, new.turns, new.notes) if same else new


def fill(skeleton: Skeleton, dialogue: Dialogue) -> tuple[str, list[tuple[int, int]], list[Turn]] | None:
    """Text, data ranges and turns of a row of the skeleton's shape; None if its rendering is another.

    Proven for this row: the text is the template's rendering; its characters outside the data are the skeleton's; for
    every checked turn, the prompt for it is the text up to it, and the rendering that ends with it begins with the
    text up to the turn's end.
    """
    messages = dialogue.messages
    parts: list[str] = []
    data: list[tuple[int, int]] = []
    position = 0
    for piece in skeleton.pieces:
        message = messages[piece.index]
        shown = piece.trim(message.reasoning or "" if piece.is_reasoning else message.content)
        start = position + len(piece.literal)
        position = start + len(shown)
        parts += (piece.literal, shown)
        data.append((start, position))
    parts.append(skeleton.closing)
    text = "".join(parts)
    if dialogue.text(skeleton.count) != text:
        return None
    turns = []
    for plan in skeleton.turns:
        start, end = data[plan.first][0] + plan.start, data[plan.last][1] + plan.end
        if plan.checked and not _as_served(dialogue, skeleton.count, plan.index, text, start, end):
            return None
        turns.append(Turn(plan.index, start, end, plan.ended, True))
    return text, data, turns


def _as_served(dialogue: Dialogue, count: int, index: int, text: str, start: int, end: int) -> bool:
    prompt = dialogue.text(index, ask=True)
    if len(prompt) != start or not text.startswith(prompt):
        return False
    return index + 1 == count or dialogue.text(index + 1).startswith(text[:end])

"""Turns of templates that mark with ``{% generation %}`` what is learned; the marks are followed to the letter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tunesmith.data.dialogue import Dialogue
from tunesmith.data.trace import MARK, Span, TracedStr
from tunesmith.data.turns import Found, Placed, Turn, remarks
from tunesmith.data.wire import owner
from tunesmith.data.words import Words, common_length, merged
from tunesmith.errors import TemplateError

_ELSEWHERE = "the template's marks begin a turn elsewhere than its prompt for the turn ends; the marks are followed"


def turns_by_marks(text: TracedStr, dialogue: Dialogue, count: int, indices: Sequence[int], words: Words) -> Found:
    """The marked ranges as turns, each of the message that it holds text of, or of the nearest turn.

    Args:
        text: the rendering.
        dialogue: the conversation.
        count: how many of its messages are rendered.
        indices: numbers of the turns to learn.
        words: of the template.

    Raises:
        TemplateError: nothing is marked.
    """
    marked = merged(span for span in text.spans if span.origin == MARK)
    if not marked and indices:
        raise TemplateError("the template has generation marks, but marks nothing in this conversation")
    spans = [span for span in text.spans if span.origin >= 0]
    found = Found()
    for start, end in marked:
        inside = [span for span in spans if start <= span.start < end]
        owners = {owner(span.origin) for span in inside}
        if not owners:
            owners = {_nearest(spans, start, end, dialogue, count)}
        index = min((i for i in owners if i in indices), default=min(owners))
        if dialogue.messages[index].role != "assistant" or index in indices:
            turn = Turn(index, start, end, ended=words.ends(text[start:end]), served=False)
            found.placed.append(_checked(str.__str__(text), dialogue, count, turn))
    shown = {i for i in (placed.turn.index for placed in found.placed) if _holds_text(i, dialogue, found, text)}
    found.placed = [placed for placed in found.placed if placed.turn.index in shown]
    found.missing = {i: f"the template's marks leave out turn {i + 1}" for i in indices if i not in shown}
    _remark(text, dialogue, found, marked)
    torn = {placed.turn.index for placed in found.placed if not placed.best}
    found.placed = [replace(placed, best=placed.turn.index not in torn) for placed in found.placed]
    return found


def _holds_text(index: int, dialogue: Dialogue, found: Found, text: TracedStr) -> bool:
    """Whether the ranges of a turn hold something of what it says, if it says anything."""
    message = dialogue.messages[index]
    if not (message.content.strip() or message.reasoning or message.tool_calls):
        return True
    ranges = [(placed.turn.start, placed.turn.end) for placed in found.placed if placed.turn.index == index]
    own = [span for span in text.spans if owner(span.origin) == index and any(a <= span.start < b for a, b in ranges)]
    return any(str.__str__(text)[span.start : span.end].strip() for span in own)


def _nearest(spans: Sequence[Span], start: int, end: int, dialogue: Dialogue, count: int) -> int:
    """The assistant turn to which a marked range without text belongs: the first between the texts around it."""
    before = max((owner(span.origin) for span in spans if span.end <= start), default=0)
    after = min((owner(span.origin) for span in spans if span.start >= end), default=count - 1)
    return next((i for i in range(before, after + 1) if dialogue.messages[i].role == "assistant"), before)


def _checked(text: str, dialogue: Dialogue, count: int, turn: Turn) -> Placed:
    """A marked range, compared with what serving renders."""
    prompt, final = dialogue.prompt(turn.index), dialogue.final(turn.index)
    prompted = prompt is not None and text.startswith(prompt)
    shown = len(text[: turn.end].rstrip())
    same = final is None or turn.index + 1 == count or common_length(text, final) >= shown
    notes = () if prompt is None or len(prompt) == turn.start else (_ELSEWHERE,)
    could = prompt is not None and final is not None and final.startswith(prompt)
    return Placed(replace(turn, served=prompted and same), same and (prompted or not could), notes)


def _remark(text: TracedStr, dialogue: Dialogue, found: Found, marked: Sequence[tuple[int, int]]) -> None:
    """Add to the first range of each turn what its marks leave out or the template rewrites."""
    for position, placed in enumerate(found.placed):
        index = placed.turn.index
        if any(other.turn.index == index for other in found.placed[:position]):
            continue
        own = [span for span in text.spans if owner(span.origin) == index]
        inside = [span for span in own if any(a < span.end and span.start < b for a, b in marked)]
        notes = remarks(dialogue.messages[index], index, str.__str__(text), inside)
        found.placed[position] = replace(placed, notes=(*placed.notes, *notes))

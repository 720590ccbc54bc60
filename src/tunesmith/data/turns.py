"""Where the assistant's turns lie in a rendered conversation.

A turn begins where the template, asked to prompt for it, stops, and includes the text with which the template ends
it. Both are found by rendering the conversation up to the turn: asked for the turn, and ending with it. What comes
from a message, and from which, is known from the traced text.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

from tunesmith.data.trace import MARK, Span, TracedStr
from tunesmith.data.wire import CALLS, CONTENT, FIELDS, REASONING, owner
from tunesmith.data.words import Words, blanks, common_length
from tunesmith.errors import TemplateError
from tunesmith.types import Message

ALL_CHECKED = 8
"""Up to so many assistant turns, each is checked against what serving renders; above, some (see ``checked_turns``)."""

REWRITTEN = "the template rewrites or shortens an assistant turn; what it shows is learned"


@dataclass(frozen=True, slots=True)
class Turn:
    """One assistant turn in a rendering.

    Attributes:
        index: number of its message, from 0.
        start: first character that is learned.
        end: character after the last one, of what ends the turn.
        ended: whether an end of turn is part of it.
        served: whether ``text[:start]`` is what serving prompts with when asked for this turn, and
            ``text[start:end]`` is what the turn looks like as the last one.
    """

    index: int
    start: int
    end: int
    ended: bool
    served: bool


@dataclass(frozen=True, slots=True)
class Placed:
    """A turn, and what views have to know of it.

    Attributes:
        turn: where it is.
        best: whether no rendering shows it closer to what serving does.
        notes: remarks on it.
    """

    turn: Turn
    best: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Sample:
    """How a checked turn looks: the text before its own, the part of it that is not learned, the text after it, and remarks."""

    before: str
    opening: str
    ending: str
    ended: bool
    served: bool
    notes: tuple[str, ...]


@dataclass(slots=True)
class Found:
    """What was found in one rendering: turns in order, and the reason for each that is not there."""

    placed: list[Placed] = field(default_factory=list)
    missing: dict[int, str] = field(default_factory=dict)


class Prefixes(Protocol):
    """Renderings of the beginning of one conversation; None where the template refuses it."""

    messages: Sequence[Message]

    def prompt(self, index: int) -> str | None:
        """The text that asks for message ``index``."""

    def final(self, index: int) -> str | None:
        """The text of the conversation that ends with message ``index``."""

    def traced_prompt(self, index: int) -> TracedStr | None:
        """``prompt``, traced."""

    def traced_final(self, index: int) -> TracedStr | None:
        """``final``, traced."""


def checked_turns(indices: Sequence[int], everything: bool = False) -> set[int]:
    """Which turns are checked by rendering: all of eight or fewer, else the first, the last, and number 2, 4, 8, ...

    The lengths of the prefixes that are rendered then add up to less than three conversations.
    """
    if everything or len(indices) <= ALL_CHECKED:
        return set(indices)
    chosen = {0, len(indices) - 1} | {1 << n for n in range(len(indices).bit_length()) if 1 << n < len(indices)}
    return {indices[position] for position in chosen}


def remarks(message: Message, index: int, text: str, inside: Sequence[Span]) -> list[str]:
    """What a person should know of how a template shows a turn.

    Args:
        message: the turn.
        index: its number.
        text: the rendering.
        inside: the spans of the turn that are learned.
    """
    parts = {span.origin - FIELDS * index for span in inside}
    content, calls = (
        "".join(text[span.start : span.end] for span in inside if span.origin == FIELDS * index + part)
        for part in (CONTENT, CALLS)
    )
    notes = []
    if content.strip() != message.content.strip():
        notes.append(REWRITTEN)
    if message.reasoning and message.reasoning.strip() and REASONING not in parts:
        notes.append("the template leaves out the reasoning of an assistant turn")
    if message.tool_calls and CALLS not in parts:
        notes.append("the template leaves out the tool calls of an assistant turn")
    elif any(calls.count(name) < n for name, n in Counter(call.name for call in message.tool_calls).items()):
        notes.append("the template leaves out some tool calls of an assistant turn")
    return notes


class TurnFinder:
    """Finds turns in one rendering of a conversation.

    Args:
        text: the rendering.
        count: how many messages it holds.
        prefixes: renderings of its beginnings.
        words: of the template.
        checked: numbers of the turns that are checked by rendering.
    """

    def __init__(self, text: TracedStr, count: int, prefixes: Prefixes, words: Words, checked: set[int]) -> None:
        self._spans = [span for span in text.spans if span.origin != MARK]
        self._starts = [span.start for span in self._spans]
        self._ends = [span.end for span in self._spans]
        self._own: dict[int, list[Span]] = {}
        for span in self._spans:
            self._own.setdefault(owner(span.origin), []).append(span)
        self._text = str.__str__(text)
        self._last = count - 1
        self._prefixes = prefixes
        self._words = words
        self._checked = checked
        self._samples: dict[object, _Sample] = {}

    def find(self, indices: Sequence[int]) -> Found:
        """Find the turns with these numbers.

        Raises:
            TemplateError: the texts of turns are mixed, or nothing ever ends a turn.
        """
        found = Found()
        for index in sorted(indices, key=lambda i: (i not in self._checked, i)):
            if not self._shows(index):
                found.missing[index] = self._why_missing(index)
                continue
            placed = self._place(index)
            if reason := self._why_torn(placed.turn):
                found.missing[index] = reason
            else:
                found.placed.append(placed)
        found.placed.sort(key=lambda placed: placed.turn.index)
        if any(one.turn.end > other.turn.start for one, other in pairwise(found.placed)):
            raise TemplateError("the template mixes the texts of several turns")
        return found

    def _shows(self, index: int) -> bool:
        """Whether there is text of a turn; of a turn that says something, more than blanks."""
        message = self._prefixes.messages[index]
        own = self._own.get(index, [])
        return bool(self._joined(own).strip() if message.content.strip() or message.reasoning or message.tool_calls else own)

    def _why_missing(self, index: int) -> str:
        message = self._prefixes.messages[index]
        if message.content.strip():
            return f"the template leaves out turn {index + 1}"
        if message.tool_calls:
            return f"the template leaves out turn {index + 1}: it does not show tool calls"
        return f"turn {index + 1} is empty, so there is nothing to learn in it"

    def _why_torn(self, turn: Turn) -> str | None:
        """Why a turn cannot be learned where it was found: text of others in it, or some of its own elsewhere."""
        position = bisect_left(self._ends, turn.start + 1)
        while position < len(self._spans) and self._spans[position].start < turn.end:
            if owner(self._spans[position].origin) != turn.index:
                return f"the template mixes the text of other messages into turn {turn.index + 1}"
            position += 1
        for part in (CONTENT, REASONING, CALLS):
            spans = [span for span in self._own[turn.index] if span.origin == FIELDS * turn.index + part]
            outside = [span for span in spans if span.start >= turn.end or span.end <= turn.start]
            if outside and (part == CONTENT or len(outside) == len(spans)):
                inside = self._joined([span for span in spans if span not in outside])
                if part != CONTENT or self._joined(outside) not in inside:
                    return f"the template shows some of turn {turn.index + 1} away from the rest of it"
        return None

    def _joined(self, spans: Iterable[Span]) -> str:
        return "".join(self._text[span.start : span.end] for span in spans)

    # ---- one turn

    def _place(self, index: int) -> Placed:
        kind = self._kind(index)
        if index not in self._checked and kind in self._samples:
            placed = self._by_sample(index, self._samples[kind])
            if placed is not None:
                return placed
        first = self._own[index][0].start
        before = self._before(first)
        notes: list[str] = []
        start, prompted = self._start(index, before, first, notes)
        end, same = self._end(index, start, notes)
        if not prompted and not notes:
            notes.append("the text before a turn is not what serving prompts for it with")
        if not same:
            notes.append("a turn is shown otherwise than as the last turn of a conversation")
        turn_tail = self._text[self._last_own(index, start, end) : end]
        prompt, final = self._prefixes.prompt(index), self._prefixes.final(index)
        could = prompt is not None and final is not None and final.startswith(prompt)
        best = final is None or (same and (prompted or not could))
        turn = Turn(index, start, end, self._words.ends(turn_tail), prompted and same)
        if best:
            opening = self._text[before:start]
            sample = _Sample(self._text[before:first], opening, turn_tail, turn.ended, turn.served, tuple(notes))
            self._samples.setdefault(kind, sample)
        return Placed(turn, best, (*notes, *self._shown(index, start, end)))

    def _kind(self, index: int) -> object:
        message = self._prefixes.messages[index]
        previous = self._prefixes.messages[index - 1].role if index else None
        return previous, bool(message.content.strip()), bool(message.reasoning), len(message.tool_calls), index == self._last

    def _by_sample(self, index: int, sample: _Sample) -> Placed | None:
        """A turn that is opened and ended exactly as a checked one of its kind was, or None."""
        own = self._own[index]
        before = self._before(own[0].start)
        start = before + len(sample.opening)
        if start > own[0].start or self._text[before : own[0].start] != sample.before:
            return None
        for span in reversed(own):
            if self._text.startswith(sample.ending, span.end):
                end = span.end + len(sample.ending)
                turn = Turn(index, start, end, sample.ended, sample.served)
                return Placed(turn, True, (*sample.notes, *self._shown(index, start, end)))
        return None

    def _before(self, first: int) -> int:
        """Where the text before a turn's first character, that comes from no message, begins."""
        position = bisect_left(self._starts, first)
        return self._spans[position - 1].end if position else 0

    def _last_own(self, index: int, start: int, end: int) -> int:
        return max((span.end for span in self._own[index] if start < span.end <= end), default=start)

    def _shown(self, index: int, start: int, end: int) -> list[str]:
        inside = [span for span in self._own[index] if span.start < end and span.end > start]
        return remarks(self._prefixes.messages[index], index, self._text, inside)

    # ---- where it begins

    def _start(self, index: int, before: int, first: int, notes: list[str]) -> tuple[int, bool]:
        """Where the prompt for a turn ends, and whether it is exactly the text up to there."""
        prompt = self._prefixes.prompt(index)
        if prompt is not None and self._text.startswith(prompt) and before <= len(prompt) < self._own[index][-1].end:
            return len(prompt), True
        gap = self._text[before:first]
        place = self._start_in_gap(gap, self._opener(index), notes)
        message = self._prefixes.messages[index]
        if place is None and prompt is not None and (message.tool_calls or message.reasoning):
            leaves = common_length(self._text, prompt)  # what opens a call or a thought is the turn's, too
            place = len(self._words.whole(self._text[before:leaves], gap)) if before <= leaves <= first else None
        return before + (len(gap) if place is None else place), False

    def _opener(self, index: int) -> str:
        """The template's own text at the end of the prompt for a turn."""
        if self._prefixes.prompt(index) is None:
            return self._words.prompt
        traced = self._prefixes.traced_prompt(index)
        assert traced is not None
        plain = str.__str__(traced)
        return plain[max((span.end for span in traced.spans), default=0) :]

    def _start_in_gap(self, gap: str, prompt: str, notes: list[str]) -> int | None:
        """Where the opening of a reply ends in the text before it; None if nothing like it is there."""
        words = self._words
        for text in (prompt, words.prompt):
            found = gap.rfind(text)
            if text and found >= 0:
                return found + len(text)
        for text in (prompt, words.prompt):  # the end of the message before may differ, the header of the reply not
            for length in range(len(text) - 1, 0, -1):
                found = gap.rfind(text[:length])
                if found < 0:
                    continue
                kept = words.whole(words.whole(text[:length], text), gap[found:])
                cut = max(kept.rfind("\n") + 1, words.last_end(kept))
                if kept[:cut].strip():
                    notes.append(f"in chat the template opens replies with {text[cut:]!r}, these turns are opened otherwise")
                    return found + cut
        return None

    # ---- where it ends

    def _end(self, index: int, start: int, notes: list[str]) -> tuple[int, bool]:
        """Where a turn with its end ends, and whether it looks so as the last turn, too."""
        if index == self._last:
            return self._end_as_final(self._text, self._own[index][-1].end, index, notes), True
        final = self._prefixes.final(index)
        if final is None:
            return self._end_by_literal(index, start, None, notes)
        shared = common_length(self._text, final)
        last = self._last_own(index, start, shared)
        if last > start and shared >= len(final.rstrip()):
            return self._end_as_final(final, last, index, notes), True
        if last > start and (cut := self._words.last_end(self._unasked(self._text[last:shared]))):
            return last + cut, True
        return self._end_by_literal(index, start, self._prefixes.traced_final(index), notes)

    def _end_as_final(self, final: str, last: int, index: int, notes: list[str]) -> int:
        """Where a turn ends that the whole text shows as ``final`` does, its own text ending at ``last``."""
        tail = self._unasked(final[last:]).rstrip()
        end = last + len(tail)
        if not self._words.ends(tail):
            token = self._words.tokens.match(self._text, end + blanks(self._text, end))
            if token and self._can_end(index, token.group()):
                return token.end()
            self._note_no_end(index, notes)
        return end

    def _can_end(self, index: int, token: str) -> bool:
        """Whether a token that follows a turn can be its end, and is not the beginning of the next message."""
        words, messages = self._words, self._prefixes.messages
        if token == words.eos:
            return True
        follows_user = index < self._last and messages[index + 1].role == "user"
        return follows_user and token != words.bos and token not in words.openers

    def _unasked(self, tail: str) -> str:
        """``tail`` up to where the template prompts for the next reply without being asked."""
        return tail.partition(self._words.opening)[0] if self._words.opening else tail

    def _end_by_literal(self, index: int, start: int, final: TracedStr | None, notes: list[str]) -> tuple[int, bool]:
        """The end of a turn that is shown otherwise as the last one: what follows its text there, if it does here."""
        own = [span for span in self._own[index] if span.end > start]
        ending = self._words.ending.rstrip()
        if final is not None:
            last = max((span.end for span in final.spans if owner(span.origin) == index), default=len(final))
            ending = self._unasked(str.__str__(final)[last:]).rstrip()
        for span in reversed(own):
            if ending and self._text.startswith(ending, span.end):
                return span.end + len(ending), False
        last = own[-1].end
        token = self._words.tokens.match(self._text, last + blanks(self._text, last))
        if token and (self._can_end(index, token.group()) or (self._words.ends(ending) and token.group() != self._words.bos)):
            return token.end(), False
        self._note_no_end(index, notes)
        return last, False

    def _note_no_end(self, index: int, notes: list[str]) -> None:
        if not self._words.ending.strip() and not self._words.ends_midway:
            raise TemplateError(
                f"nothing ends turn {index + 1} in the chat template, so the model would never learn to stop; "
                "let the template put the end-of-turn token after every assistant turn"
            )
        where = "the last turn" if index == self._last else "a turn in the middle"
        notes.append(f"nothing ends {where} in the template; its end is not learned")

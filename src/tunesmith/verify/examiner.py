"""Judges masks: what training would learn of a conversation against what transformers alone says of it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from tunesmith.data.template import ChatTemplate, Rendered
from tunesmith.data.tokenize import Text, TextEncoder
from tunesmith.data.words import common_length
from tunesmith.errors import TemplateError
from tunesmith.verify.conversations import Talk
from tunesmith.verify.oracle import Library, Span, TokenBytes, occurrences
from tunesmith.verify.outcome import Judged

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKS_PROMPT = "the marks hold text that the prompt for a reply gives"
MARKS_LATE = "the marks leave out how a turn begins, which the prompt for it does not give"
MARKS_NO_END = "the marks leave out the end of a turn"

_OPENING = 8
"""Characters that a text before a turn and the prompt for it must have in common at their ends to be the same opening."""

_MARKS = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")


class _Wrong(Exception):
    """A mask is not what the oracle says."""


class Examiner:
    """Judges the masks of one template.

    Args:
        tokenizer: to render and tokenise with.
        source: the template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
        self._tokenizer = tokenizer
        self._bytes = TokenBytes(tokenizer)
        self._encoder = TextEncoder(tokenizer)
        added = sorted((token.content for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, added)) or "(?!)")
        self._template = ChatTemplate(tokenizer, source=source)
        marked = _MARKS.search(source) is not None
        self._bare = ChatTemplate(tokenizer, source=_MARKS.sub(_without_mark, source)) if marked else None

    def judge(self, talk: Talk, number: int = 0) -> Judged:
        """What the oracle says of the masks of one conversation."""
        differences: set[str] = set()
        try:
            turns, exact = self._examine(self._template, talk, self._bare is not None)
            if self._bare is not None:
                differences = self._compare_with_marks(self._bare, talk)
        except TemplateError as error:
            return Judged("refused", str(error), number=number)
        except _Wrong as error:
            return Judged("wrong", str(error), number=number)
        return Judged("certified", "", turns, exact, number, tuple(sorted(differences)))

    def _examine(self, template: ChatTemplate, talk: Talk, marked: bool) -> tuple[int, int]:
        """Check all views of a conversation. Returns the turns that are learned, and those that are known exactly."""
        views = template.views(talk.messages, talk.tools)
        library = self._library(template, talk)
        learned: Counter[str] = Counter()
        turns, exact = set(), set()
        for view in views:
            count = _length(library, view, len(talk.messages))
            starts, mask = self._tokens(view)
            marks = library.marks(count) if marked else []
            places = {len(library.text(turn.index, ask=True) or "") for turn in view.turns}
            places |= {begin for word in talk.words for begin, _ in occurrences(view.text, word)}
            for run in _runs(starts, mask):
                stretch = _unjoined(run, starts, places)
                index = _owner(stretch, view.text, talk)
                turns.add(index)
                learned.update(word for word in talk.words if word in view.text[stretch[0] : stretch[1]])
                if marked:
                    _check_marks(run, marks, starts, view.text)
                    exact.add(index)
                elif self._check_turn(run, index, view.text, starts, library, talk):
                    exact.add(index)
        self._check_all(talk, library, learned, exact, marked)
        return len(turns), len(exact)

    def _library(self, template: ChatTemplate, talk: Talk) -> Library:
        messages, tools = template.wired(talk.messages, talk.tools)
        return Library(self._tokenizer, template.source, messages, tools)

    def _tokens(self, view: Rendered) -> tuple[list[int], list[bool]]:
        """Where each token of a view begins (and the length of the text), and whether it is learned."""
        (tokens,) = self._encoder.encode([Text(view.text, tuple((t.start, t.end) for t in view.turns), view.data)])
        ids = tokens.ids.tolist()
        starts = self._bytes.starts(view.text, ids)
        if starts is None:
            raise _Wrong("the tokens do not spell the text")
        mask = [False] * len(ids)
        for start, end in tokens.spans:
            mask[start:end] = [True] * (end - start)
        return starts, mask

    @staticmethod
    def _check_all(talk: Talk, library: Library, learned: Counter[str], exact: set[int], marked: bool) -> None:
        """Every turn is learned once, and as it is served where it can be."""
        for word, index in talk.words.items():
            message = talk.messages[index] if index >= 0 else None
            if message is None or message.role != "assistant" or message.weight == 0:
                continue
            final = library.text(index + 1)
            shown = final if final is not None else library.text(len(talk.messages)) or ""
            if marked:
                marks = library.marks(index + 1) if final is not None else []
                shown = "\0".join(shown[start:end] for start, end in marks)
            if learned[word] > 1:
                raise _Wrong(f"turn {index + 1} is learned {learned[word]} times")
            if learned[word] == 0 and word in shown:
                raise _Wrong(f"some of turn {index + 1} is not learned")
            prompt = library.text(index, ask=True)
            served = prompt is not None and final is not None and final.startswith(prompt)
            if served and not marked and index not in exact:
                raise _Wrong(f"turn {index + 1} is not learned as serving would have it")

    def _compare_with_marks(self, bare: ChatTemplate, talk: Talk) -> set[str]:
        """Compare with what is learned without the marks. Returns how the two differ, as far as they may."""
        try:
            self._examine(bare, talk, False)
            derived = bare.rendered(talk.messages, talk.tools)
            marked = self._template.rendered(talk.messages, talk.tools)
        except TemplateError:  # nothing to compare with: some turn is in no rendering of the whole
            return set()
        library = self._library(bare, talk)
        differences: set[str] = set()
        for turn in derived.turns:
            marks = sorted((other.start, other.end) for other in marked.turns if other.index == turn.index)
            prompt = library.text(turn.index, ask=True) or ""
            differences |= _difference((turn.start, turn.end), marks, derived.text, prompt, turn.index)
        return differences

    def _check_turn(self, run: Span, index: int, text: str, starts: Sequence[int], library: Library, talk: Talk) -> bool:
        """Check beginning and end of a turn; returns whether it stands as serving would have it."""
        final = library.text(index + 1)
        words = [word for word, owner in talk.words.items() if owner == index]
        served = self._check_beginning(run, index, text, starts, library, talk)
        own_end = max(end for word in words for _, end in occurrences(text, word) if end <= run[1])
        ends = [end for word in words for _, end in occurrences(final or "", word)]
        if final is None or not ends:
            return False
        self._check_end(index, text[own_end:], run[1] - own_end, final[max(ends) :], final == library.text(index + 1, ask=True))
        return served and text.startswith(final[: max(ends)])

    def _check_beginning(self, run: Span, index: int, text: str, starts: Sequence[int], library: Library, talk: Talk) -> bool:
        """A turn begins where its prompt ends, or where the text leaves it; returns whether the text begins with the prompt.

        Where the text leaves the prompt, both may have the beginning of a word or token in common. Where they part
        earlier, because the prompt shows earlier messages otherwise, the turn is opened as some prompt opens one.
        """
        prompt = library.text(index, ask=True)
        if prompt is None:
            return False
        shared = self._whole_tokens(text, common_length(prompt, text))
        if run[0] == next((start for start in starts if start >= shared), None):
            return shared == len(prompt)
        if shared < len(prompt):
            message, again = talk.messages[index], text[run[0] : shared]
            part = "\n" not in again and not self._added.search(again)
            own = any((said or "").lstrip().startswith(again) for said in (message.reasoning, message.content))
            if again and (part or own):
                return False
            prompts = [library.text(i, ask=True) for i, m in enumerate(talk.messages) if m.role == "assistant"]
            before = max((start for start in starts if start < run[0]), default=0)  # of a token that may join the two
            places = range(before + 1, run[0] + 1)
            openings = (_common_end(other, text[:place]) for other in prompts if other for place in places)
            if any(self._added.search(opening) for opening in openings):
                return False
        between = text[min(run[0], shared) : max(run[0], shared)]
        raise _Wrong(f"turn {index + 1} begins at character {run[0]}, the text leaves its prompt at {shared}: {between!r}")

    def _whole_tokens(self, text: str, length: int) -> int:
        """``length``, or as much less as leaves out an added token of the text of which it holds a part."""
        return next((token.start() for token in self._added.finditer(text) if token.start() < length < token.end()), length)

    def _check_end(self, index: int, rest: str, length: int, final: str, unasked: bool) -> None:
        """What is learned behind a turn's last word is what the text has in common with the rendering that ends with it.

        Args:
            index: of the turn.
            rest: the text behind the turn's last word.
            length: characters of it that are learned.
            final: the same place in the rendering that ends with the turn.
            unasked: whether that rendering prompts for the next reply without being asked.
        """
        tail = rest[:length].strip()
        shared = rest[: self._whole_tokens(final, common_length(rest, final))].strip()
        if tail == shared or (unasked and shared.startswith(tail) and self._added.search(tail)):
            return
        late = shared == final.strip()  # the end comes with the next message only
        if late and self._added.fullmatch(tail.removeprefix(shared).strip()):
            return
        raise _Wrong(f"turn {index + 1} ends with {rest[:length]!r}; as the last one with {final!r}")


def _common_end(one: str, other: str) -> str:
    return one[len(one) - common_length(one[::-1], other[::-1]) :]


def _without_mark(mark: re.Match[str]) -> str:
    """A block that does nothing and strips the blanks around it as the mark did."""
    return mark.group().replace("endgeneration", "endif").replace("generation", "if true")


def _length(library: Library, view: Rendered, count: int) -> int:
    """How many messages a view shows: the fewest that hold its turns and that transformers renders so."""
    first = max((turn.index + 1 for turn in view.turns), default=count)
    for length in range(first, count + 1):
        if library.text(length) == view.text:
            return length
    raise _Wrong("the text is not what transformers renders")


def _runs(starts: Sequence[int], mask: Sequence[bool]) -> list[Span]:
    """Character ranges of learned tokens that follow one another.

    Raises:
        _Wrong: one begins behind a token that stands at the same character, as a blank of the tokenizer's own does.
    """
    runs, begin = [], None
    for position, learned in enumerate([*mask, False]):
        if learned and begin is None:
            begin = position
            if begin and starts[begin - 1] == starts[begin]:
                raise _Wrong(f"of the tokens at character {starts[begin]}, where a turn begins, the first is not learned")
        elif not learned and begin is not None:
            runs.append((starts[begin], starts[position]))
            begin = None
    return runs


def _unjoined(run: Span, starts: Sequence[int], places: set[int]) -> Span:
    """A run, with the rest of the token before it where that joins a turn and what stands before; it is not learned."""
    before = max((start for start in starts if start < run[0]), default=0)
    return min((place for place in places if before < place < run[0]), default=run[0]), run[1]


def _owner(run: Span, text: str, talk: Talk) -> int:
    """The one assistant turn whose words a run holds, whole."""
    owners = set()
    for word, index in talk.words.items():
        for start, end in occurrences(text, word):
            if start < run[1] and run[0] < end:
                owners.add(index)
                if not (run[0] <= start and end <= run[1]):
                    raise _Wrong(f"a word of message {index + 1} is learned in part")
    if len(owners) != 1:
        raise _Wrong(f"a learned stretch holds words of {len(owners)} messages: {text[run[0] : run[1]]!r}")
    (index,) = owners
    message = talk.messages[index] if index >= 0 else None
    if message is None or message.role != "assistant" or message.weight == 0:
        raise _Wrong(f"message {index + 1} is learned and should not be")
    return index


def _difference(turn: Span, marks: Sequence[Span], text: str, prompt: str, index: int) -> set[str]:
    """How the marked ranges of a turn and what is learned without them differ, white space aside.

    Raises:
        _Wrong: in a way for which there is no reason.
    """
    found = set()
    start, end = turn
    if not marks:
        raise _Wrong(f"turn {index + 1} is learned without marks and not marked")
    first, last = marks[0][0], max(stop for _, stop in marks)
    if text[first:start].strip():
        if text[first:start] not in prompt:
            raise _Wrong(f"turn {index + 1}: marked before its prompt ends: {text[first:start]!r}")
        found.add(MARKS_PROMPT)
    if text[last:end].strip():
        found.add(MARKS_NO_END)
    if text[start:first].strip() and len(_common_end(prompt, text[:start])) >= _OPENING:
        found.add(MARKS_LATE)
        start = first
    gaps = [text[start:first], *(text[a:b] for (_, a), (b, _) in pairwise(marks)), text[end:last]]
    if any(gap.strip() for gap in gaps):
        raise _Wrong(f"turn {index + 1}: the marks and what is learned without them differ by {gaps!r}")
    return found


def _check_marks(run: Span, marks: Sequence[Span], starts: Sequence[int], text: str) -> None:
    """A run is what transformers marks, to the token."""
    for start, end in marks:
        inside = [token for token, position in enumerate(starts[:-1]) if start <= position < end]
        if inside and run == (starts[inside[0]], starts[inside[-1] + 1]):
            return
    raise _Wrong(f"learned, but not marked so: {text[run[0] : run[1]]!r}")

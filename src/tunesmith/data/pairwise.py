"""Preference pairs -> two tokenised answers to one prompt each, the better one first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from tunesmith.data.learned import Learned
from tunesmith.data.maker import DialogueMaker, Views, learned_of
from tunesmith.data.template import Rendered
from tunesmith.data.tokenize import Tokens
from tunesmith.data.truncate import keep_end
from tunesmith.types import Message, PreferencePair


class PairMaker(DialogueMaker[PreferencePair]):
    """Makes two of each pair: the prompt with the better answer, then with the worse one; only answers are learned.

    Either both are kept or neither: a pair of which one side is left without an answer token is left out.
    """

    renderings = 2

    def views(self, row: PreferencePair) -> Views:
        """One rendering of each side."""
        return [self._side(messages, row) for messages in sides(row)]

    def _side(self, messages: tuple[Message, ...], row: PreferencePair) -> Rendered:
        views = self.template.views(messages, row.tools)
        return views[0] if len(views) == 1 else self.template.rendered(messages, row.tools)

    def learned(self, row: PreferencePair, views: Views, tokens: Sequence[Tokens]) -> list[Learned]:
        """The better side, then the worse one."""
        made = [
            learned_of(messages, view, own, row.source)
            for messages, view, own in zip(sides(row), views, tokens, strict=True)
        ]  # fmt: skip
        return [made[0]._replace(good=True, margin=row.margin), made[1]._replace(good=False)]

    def without_oldest(self, row: PreferencePair, fits: Callable[[PreferencePair], bool]) -> PreferencePair | None:
        """The prompt is shortened, the same for both sides; the answers stay whole."""
        count = len(row.chosen)

        def shortened(messages: tuple[Message, ...]) -> PreferencePair:
            return replace(row, prompt=messages[: len(messages) - count])

        messages = keep_end((*row.prompt, *row.chosen), len(row.prompt), lambda shorter: fits(shortened(shorter)))
        return None if messages is None else shortened(messages)

    def trainable(self, made: list[Learned]) -> list[Learned]:
        """Both sides or none."""
        return made if len(made) == 2 and all(one.supervised for one in made) else []


def sides(row: PreferencePair) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """Both conversations of a pair; the assistant's turns in the prompt are shown, not learned."""
    prompt = tuple(replace(m, weight=0.0) if m.role == "assistant" else m for m in row.prompt)
    return (*prompt, *row.chosen), (*prompt, *row.rejected)

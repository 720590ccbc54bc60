"""Dialogues whose last answer was found good or bad -> tokenised, that answer alone marked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from tunesmith.data.learned import Learned
from tunesmith.data.maker import DialogueMaker, Views, learned_of
from tunesmith.data.tokenize import Tokens
from tunesmith.data.truncate import keep_end
from tunesmith.types import Feedback, Message


class FeedbackMaker(DialogueMaker[Feedback]):
    """Makes one of each row; what is marked is the last assistant turn, which was judged."""

    def views(self, row: Feedback) -> Views:
        """The rendering that ends with the judged turn."""
        return self.template.views(judged(row.messages), row.tools)

    def learned(self, row: Feedback, views: Views, tokens: Sequence[Tokens]) -> list[Learned]:
        """One, with the verdict."""
        messages = judged(row.messages)
        made = [learned_of(messages, view, own, row.source) for view, own in zip(views, tokens, strict=True)]
        return [one._replace(good=row.desirable) for one in made]

    def without_oldest(self, row: Feedback, fits: Callable[[Feedback], bool]) -> Feedback | None:
        """The judged turn stays, with its question."""
        messages = keep_end(row.messages, len(row.messages) - 1, lambda shorter: fits(replace(row, messages=shorter)))
        return None if messages is None else replace(row, messages=messages)


def judged(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages with no weight on any assistant turn but the last."""
    earlier = (replace(m, weight=0.0) if m.role == "assistant" else m for m in messages[:-1])
    return (*earlier, messages[-1])

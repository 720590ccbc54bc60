"""Conversations -> examples in which every assistant turn is learned once, as serving will ask for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from tunesmith.data.learned import Learned
from tunesmith.data.maker import DialogueMaker, Views, learned_of
from tunesmith.data.tokenize import Tokens
from tunesmith.data.truncate import keep_end
from tunesmith.types import Conversation


class ConversationMaker(DialogueMaker[Conversation]):
    """Makes examples of conversations.

    A row whose template rewrites earlier turns (reasoning that is dropped later) becomes several, so that each turn is
    learned as serving will ask for it.
    """

    def views(self, row: Conversation) -> Views:
        """Renderings in which every assistant turn is learned once."""
        return self.template.views(row.messages, row.tools)

    def learned(self, row: Conversation, views: Views, tokens: Sequence[Tokens]) -> list[Learned]:
        """One for each rendering."""
        return [learned_of(row.messages, view, own, row.source) for view, own in zip(views, tokens, strict=True)]

    def without_oldest(self, row: Conversation, fits: Callable[[Conversation], bool]) -> Conversation | None:
        """The last learned turn stays, with its question."""
        last = max((i for i, m in enumerate(row.messages) if m.role == "assistant" and m.weight > 0), default=-1)
        messages = keep_end(row.messages, last, lambda shorter: fits(replace(row, messages=shorter)))
        return None if messages is None else replace(row, messages=messages)

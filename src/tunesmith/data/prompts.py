"""Dialogues that the model is to go on with -> token ids that end where its turn begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from tunesmith.data.learned import Learned
from tunesmith.data.maker import DialogueMaker, Views
from tunesmith.data.tokenize import Tokens
from tunesmith.data.truncate import keep_end
from tunesmith.types import Prompt


class PromptMaker(DialogueMaker[Prompt]):
    """Makes one of each row; nothing of it is learned."""

    def views(self, row: Prompt) -> Views:
        """The text that asks for the next turn, as chat and serving make it."""
        return [self.template.prompt(row.messages, row.tools)]

    def learned(self, row: Prompt, views: Views, tokens: Sequence[Tokens]) -> list[Learned]:
        """One, with its turns and with the answer that the data give."""
        own = tokens[0].ids
        return [Learned(own, (), row.source, reference=row.reference, messages=row.messages, tools=row.tools)]

    def without_oldest(self, row: Prompt, fits: Callable[[Prompt], bool]) -> Prompt | None:
        """The end of the prompt stays."""
        messages = keep_end(row.messages, len(row.messages), lambda shorter: fits(replace(row, messages=shorter)))
        return None if messages is None else replace(row, messages=messages)

    def trainable(self, made: list[Learned]) -> list[Learned]:
        """A prompt always serves."""
        return made

"""Conversations -> examples in which every assistant turn is learned once, as serving will ask for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from tunesmith.data.learned import Learned
from tunesmith.data.maker import DialogueMaker, Limits, Views, learned_of
from tunesmith.data.objective import EVERY_TURN, Objective, completed, filled
from tunesmith.data.report import DataReport
from tunesmith.data.template import ChatTemplate
from tunesmith.data.tokenize import Tokens
from tunesmith.data.truncate import keep_end
from tunesmith.types import Conversation

_WEIGHTLESS = "the last assistant turn has the weight 0, and mask_history learns no other"


class ConversationMaker(DialogueMaker[Conversation]):
    """Makes examples of conversations.

    A row whose template rewrites earlier turns (reasoning that is dropped later) becomes several, so that each turn is
    learned as serving will ask for it.

    Args:
        template, limits: as for any dialogues.
        objective: what is learned of a row.
    """

    def __init__(self, template: ChatTemplate, limits: Limits, objective: Objective = EVERY_TURN) -> None:
        super().__init__(template, limits)
        self.objective = objective
        self.learns_prompt = objective.train_on_prompt

    def render(self, row: Conversation, report: DataReport) -> tuple[Conversation, Views] | None:
        """As for any dialogues; a row whose only turn to learn has no weight is left out."""
        weighed = replace(row, messages=self.objective.weighed(row.messages))
        learned = any(message.role == "assistant" and message.weight > 0 for message in weighed.messages)
        if learned or not self.objective.mask_history:
            return super().render(weighed, report)
        report.add("dropped", "nothing-to-learn", _WEIGHTLESS, row.source, "Give the turn a weight, or leave the row out.")
        return None

    def views(self, row: Conversation) -> Views:
        """Renderings in which all that is learned of the row is learned once."""
        views = self.template.views(row.messages, row.tools)
        return completed(views, row, self.template) if self.learns_prompt else views

    def learned(self, row: Conversation, views: Views, tokens: Sequence[Tokens]) -> list[Learned]:
        """One for each rendering."""
        made = [learned_of(row.messages, view, own, row.source) for view, own in zip(views, tokens, strict=True)]
        if self.learns_prompt:
            before = {turn.index for view in views[:-1] for turn in view.turns}
            made[-1] = filled(made[-1], [turn.index in before for turn in views[-1].turns])
        return made

    def without_oldest(self, row: Conversation, fits: Callable[[Conversation], bool]) -> Conversation | None:
        """The last learned turn stays, with its question."""
        last = max((i for i, m in enumerate(row.messages) if m.role == "assistant" and m.weight > 0), default=-1)
        messages = keep_end(row.messages, last, lambda shorter: fits(replace(row, messages=shorter)))
        return None if messages is None else replace(row, messages=messages)

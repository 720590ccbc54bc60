"""What of a dialogue is learned: every assistant turn, the last one alone, or all of the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from tunesmith.data.feedback import judged
from tunesmith.data.learned import Learned
from tunesmith.data.template import ChatTemplate, Rendered
from tunesmith.types import Conversation, Message


@dataclass(frozen=True, slots=True)
class Objective:
    """What is learned of each row; by default every assistant turn, by its weight.

    Attributes:
        mask_history: only the last assistant turn.
        train_on_prompt: all tokens but the first, each once: the text of the whole conversation, and turns that it shows
            otherwise than serving does where they are shown as served. Turns keep their weights.
    """

    mask_history: bool = False
    train_on_prompt: bool = False

    def weighed(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        """The messages with the weights by which they are learned."""
        if not self.mask_history:
            return messages
        end = 1 + max(index for index, message in enumerate(messages) if message.role == "assistant")
        return (*judged(messages[:end]), *messages[end:])


EVERY_TURN = Objective()


def completed(views: list[Rendered], row: Conversation, template: ChatTemplate) -> list[Rendered]:
    """The views of a row, the last one of all its text with every assistant turn that it shows.

    Raises:
        TemplateError: where a turn begins and ends in the whole text cannot be told.
    """
    turns = {index for index, message in enumerate(row.messages) if message.role == "assistant"}
    if row.messages[-1].role == "assistant" and turns <= {turn.index for turn in views[-1].turns}:
        return views
    whole = replace(template.whole(row.messages, row.tools), notes=views[-1].notes)
    return [*(views[:-1] if views[-1].text == whole.text else views), whole]


def filled(row: Learned, elsewhere: Sequence[bool]) -> Learned:
    """A row of which everything but the first token is learned, with weight 1 outside its spans.

    Args:
        row: the whole text; its spans are the turns.
        elsewhere: for each span, whether it is learned in another view, and so not here.
    """
    spans = [(start, end, 0.0 if other else weight) for (start, end, weight), other in zip(row.spans, elsewhere, strict=True)]
    ends = [(1, 1, 1.0), *spans, (len(row.ids), len(row.ids), 1.0)]
    pieces = [piece for one, other in pairwise(ends) for piece in ((one[1], other[0], 1.0), other)]
    joined: list[tuple[int, int, float]] = []
    for start, end, weight in pieces:
        if joined and joined[-1][1:] == (start, weight):
            joined[-1] = (joined[-1][0], end, weight)
        elif start < end:
            joined.append((start, end, weight))
    return row._replace(spans=tuple(span for span in joined if span[2] > 0))

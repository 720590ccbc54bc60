"""Random conversations in which every text can be found again by words that occur nowhere else."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.types import Message, ToolCall, Tools

_BLANKS = ("", "", "", " ", "  ", "\n", "\n\n", "\t")
_GLUE = (" ", " ", "  ", "\n", "\n\n", "")
_NOISE = (
    "你好，世界", "🙂", "naïve café", "a  b", "1\n2", "{{ x }}", "{% if y %}", "{# z #}", "user", "assistant", "system:", "\\n",
    '"quoted"', "</p>", "100%", "<think>", "</think>", "None", "the end.",
)  # fmt: skip
_LETTERS = "bcdfghjklmnpqrstvwxz"
_MARKUP = re.compile(r"<[^<>\s{}%'\"]{1,40}>|\[/?[A-Z_]{2,20}\]")
_MAX_EXCHANGES = 5

TOOLS_OWNER = -1
"""Owner of a word that comes from the tools."""


@dataclass(frozen=True, slots=True)
class Talk:
    """A conversation and the words that tell its texts apart.

    Attributes:
        messages: user and assistant by turns, with a system message, tool calls and tool answers in between.
        tools: functions that are offered.
        words: unique word -> number of the message that holds it, or ``TOOLS_OWNER``.
    """

    messages: tuple[Message, ...]
    tools: Tools
    words: dict[str, int]


def markup(source: str) -> list[str]:
    """What in a template's text looks like special tokens and marks, for texts that imitate it."""
    return sorted(set(_MARKUP.findall(source)))


class Talker:
    """Makes conversations.

    Args:
        seed: the same one gives the same conversations.
        imitated: texts that messages now and then contain.
    """

    def __init__(self, seed: str, imitated: Sequence[str]) -> None:
        self._random = random.Random(seed)
        self._noise = (*_NOISE, *imitated)
        self._words: dict[str, int] = {}

    def talk(self, number: int) -> Talk:
        """A conversation; ``number`` decides whether it has tools (every third) and reasoning (every fourth)."""
        rng = self._random
        self._words = {}
        with_tools, with_reasoning = number % 3 == 2, number % 4 == 3
        messages: list[Message] = []
        if rng.random() < 0.5:
            messages.append(Message("system", self._say(0)))
        for _ in range(rng.randint(1, _MAX_EXCHANGES)):
            messages.append(Message("user", self._say(len(messages))))
            if with_tools and rng.random() < 0.6:
                messages += self._called(len(messages), with_reasoning)
            reasoning = self._say(len(messages)) if with_reasoning and rng.random() < 0.7 else None
            weight = 0.0 if rng.random() < 0.1 else 1.0
            messages.append(Message("assistant", self._say(len(messages)), reasoning, weight=weight))
        tools = (self._tool(),) if with_tools else ()
        return Talk(tuple(messages), tools, dict(self._words))

    def _called(self, index: int, with_reasoning: bool) -> list[Message]:
        """A turn that calls tools, and their answers."""
        rng = self._random
        calls = tuple(self._call(index, number) for number in range(rng.choice((1, 1, 2))))
        reasoning = self._say(index) if with_reasoning else None
        content = self._say(index) if rng.random() < 0.3 else ""
        answers = [
            Message("tool", self._say(index + 1 + number), name=call.name, tool_call_id=call.id)
            for number, call in enumerate(calls)
        ]
        return [Message("assistant", content, reasoning, calls), *answers]

    def _call(self, index: int, number: int) -> ToolCall:
        arguments = {"place": self._word(index), "days": self._random.randint(1, 9), "notes": [self._word(index), "雨"]}
        return ToolCall("look_up", arguments, f"call{number:05}")

    def _tool(self) -> dict[str, object]:
        place = {"type": "string", "description": self._word(TOOLS_OWNER)}
        parameters = {"type": "object", "properties": {"place": place}, "required": ["place"]}
        function = {"name": "look_up", "description": f"Looks. {self._word(TOOLS_OWNER)}", "parameters": parameters}
        return {"type": "function", "function": function}

    def _word(self, index: int) -> str:
        word = "zq" + "".join(self._random.choices(_LETTERS, k=8))
        self._words[word] = index
        return word

    def _say(self, index: int) -> str:
        """A text: unique words at both ends and noise between them, now and then noise or blanks outside them."""
        rng = self._random
        parts = [self._word(index), *rng.choices(self._noise, k=rng.randint(0, 3)), self._word(index)]
        if rng.random() < 0.3:
            parts.insert(0, rng.choice(self._noise))
        if rng.random() < 0.3:
            parts.append(rng.choice(self._noise))
        text = parts[0]
        for part in parts[1:]:
            text += rng.choice(_GLUE) + part
        return rng.choice(_BLANKS) + text + rng.choice(_BLANKS)

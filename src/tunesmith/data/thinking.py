"""What ``enable_thinking`` means for rows and templates."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from tunesmith.data.template import ChatTemplate
from tunesmith.errors import TemplateError
from tunesmith.types import Message, PreferencePair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
LEFT_OUT = "enable_thinking is false: the reasoning of assistant turns is left out"
_IN_CONTENT = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)


def is_off(template: ChatTemplate) -> bool:
    """Whether thinking is switched off, and the template knows the switch."""
    return template.options.get("enable_thinking") is False and "enable_thinking" not in template.unread


def without_reasoning(row: T) -> T:
    """The same dialogue without what was thought, kept apart or written as ``<think>...</think>`` before an answer."""
    parts = ("prompt", "chosen", "rejected") if isinstance(row, PreferencePair) else ("messages",)
    answers: T = replace(row, **{part: tuple(map(_answer_alone, getattr(row, part))) for part in parts})  # type: ignore[type-var]
    return answers


def _answer_alone(message: Message) -> Message:
    if message.role != "assistant":
        return message
    thought = _IN_CONTENT.match(message.content)
    answer = message.content[thought.end() :] if thought else message.content
    if not answer and not message.tool_calls:  # nothing but thought: there is no answer to keep
        answer = message.content
    return replace(message, content=answer, reasoning=None)


def no_effect(tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> list[str]:
    """A sentence for each option that the tokenizer's chat template never looks at."""
    if not options:
        return []
    try:
        unread = ChatTemplate(tokenizer, options=options).unread
    except TemplateError:
        unread = tuple(options)  # there is no usable template, so nothing looks at them; who needs one says so
    return [f"{name} has no effect: the chat template never looks at it" for name in unread]

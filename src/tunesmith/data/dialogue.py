"""One conversation as its chat template renders it: whole, and each beginning of it once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from tunesmith.data.sandbox import PlainTemplate
from tunesmith.data.trace import Span, TracedStr
from tunesmith.data.tracer import TracedTemplate
from tunesmith.data.wire import CONTENT, FIELDS, Form, owner, plain_messages, plain_tools, traced_messages, traced_tools
from tunesmith.data.words import common_length
from tunesmith.errors import TemplateError
from tunesmith.types import Message, Tools

_REFUSALS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    MemoryError,
)
"""What a template can raise; all of it means that it cannot show the conversation."""


class Engine:
    """A chat template compiled twice: for plain text, and for text that knows where it comes from.

    Args:
        source: the Jinja text.
        date: what the template takes for today (ISO format); the real day if None.
        constants: variables that are the same in every rendering.

    Raises:
        jinja2.TemplateError: the text is no template.
    """

    def __init__(self, source: str, date: str | None, constants: Mapping[str, Any]) -> None:
        self.source = source
        self.constants = constants
        self._plain = PlainTemplate(source, date, constants)
        self._traced = TracedTemplate(source, date, constants)

    def plain(self, messages: list[dict[str, Any]], tools: list[Any] | None, ask: bool) -> str:
        """The text. Raises TemplateError when the template refuses the conversation."""
        try:
            return self._plain.render(messages, tools, ask)
        except _REFUSALS as error:
            raise TemplateError(f"the chat template refuses the conversation: {_reason(error)}") from None

    def traced(self, messages: list[dict[str, Any]], tools: list[Any] | None, ask: bool) -> tuple[TracedStr, bool]:
        """The text with its origins, and whether some were lost. Raises TemplateError as ``plain`` does."""
        try:
            return self._traced.render(messages, tools, ask)
        except _REFUSALS as error:
            raise TemplateError(f"the chat template refuses the conversation: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__


class Dialogue:
    """Renderings of one conversation and of its beginnings, each made when it is first asked for.

    Args:
        engine: the compiled template.
        messages: the conversation.
        tools: functions that the model may call.
        form: how the template wants its messages.

    Attributes:
        lost: whether the origin of some text had to be found by comparing renderings.
    """

    def __init__(self, engine: Engine, messages: Sequence[Message], tools: Tools, form: Form) -> None:
        self.messages = messages
        self.plain_messages = plain_messages(messages, form)
        self.plain_tools = plain_tools(tools)
        self.lost = False
        self._engine = engine
        self._form = form
        self._tools = tools
        self._known: dict[tuple[int, bool], str | None] = {}
        self._known_traced: dict[tuple[int, bool], TracedStr | None] = {}

    def text(self, count: int, ask: bool = False) -> str:
        """The first ``count`` messages as text. Raises TemplateError when the template refuses them."""
        return self._engine.plain(self.plain_messages[:count], self.plain_tools, ask)

    def prompt(self, index: int) -> str | None:
        """The text that asks for message ``index``; None if the template refuses."""
        return self._plain(index, True)

    def final(self, index: int) -> str | None:
        """The text that ends with message ``index``; None if the template refuses."""
        return self._plain(index + 1, False)

    def traced_prompt(self, index: int) -> TracedStr | None:
        """``prompt``, traced."""
        return self._traced(index, True)

    def traced_final(self, index: int) -> TracedStr | None:
        """``final``, traced."""
        return self._traced(index + 1, False)

    def _plain(self, count: int, ask: bool) -> str | None:
        key = (count, ask)
        if key not in self._known:
            try:
                self._known[key] = self.text(count, ask)
            except TemplateError:
                self._known[key] = None
        return self._known[key]

    def _traced(self, count: int, ask: bool) -> TracedStr | None:
        key = (count, ask)
        if key not in self._known_traced:
            try:
                self._known_traced[key] = self.trace(count, ask)
            except TemplateError:
                self._known_traced[key] = None
        return self._known_traced[key]

    def trace(self, count: int, ask: bool = False) -> TracedStr:
        """The first ``count`` messages as text with origins.

        Where the template uses an operation that loses them, they are found by rendering again with other texts.

        Raises:
            TemplateError: the template refuses the messages, or renders them otherwise when they are traced.
        """
        wired = traced_messages(self.messages[:count], self._form)
        text, lost = self._engine.traced(wired, traced_tools(self._tools), ask)
        if not lost:
            return text
        self.lost = True
        return self._recover(text, count, ask)

    def _recover(self, text: TracedStr, count: int, ask: bool) -> TracedStr:
        spans = list(text.spans)
        plain = str.__str__(text)
        for index in range(count):
            place = self._differing(plain, index, count, ask)
            if place is None:
                continue
            kept = [s for s in spans if owner(s.origin) != index or s.end <= place[0] or s.start >= place[1]]
            spans = [*kept, Span(*place, FIELDS * index + CONTENT, -1)]
        return TracedStr(plain, sorted(spans))

    def _differing(self, plain: str, index: int, count: int, ask: bool) -> tuple[int, int] | None:
        """The part of a rendering that changes with the text of a message; None if none does."""
        message = self.messages[index]
        other = Message(
            message.role,
            _disguise(message.content),
            None if message.reasoning is None else _disguise(message.reasoning),
            message.tool_calls,
            message.name,
            message.tool_call_id,
        )
        changed = list(self.plain_messages[:count])
        changed[index] = plain_messages([other], self._form)[0]
        result = self._engine.plain(changed, self.plain_tools, ask)
        if result == plain:
            return None
        start = common_length(plain, result)
        room = min(len(plain), len(result)) - start
        behind = common_length(plain[::-1][:room], result[::-1][:room])
        return start, len(plain) - behind


def _disguise(text: str) -> str:
    """A text of the same length and with the same blanks, other in every character."""
    return "".join(c if c.isspace() else ("q" if c != "q" else "j") for c in text)

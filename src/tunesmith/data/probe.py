"""What is found out about a chat template by rendering small conversations: how it wants messages, how it ends turns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tunesmith.data.dialogue import Dialogue, Engine
from tunesmith.data.trace import TracedStr
from tunesmith.data.wire import Form, owner
from tunesmith.data.words import Words, common_length
from tunesmith.errors import TemplateError
from tunesmith.types import Message, ToolCall, Tools

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = (Message("user", "Hello."), Message("assistant", "Good day."), Message("user", "Well?"))
_CALL = ToolCall("look_up", {"place": "Oslo"}, "abcdefghi")
_TOOL_PROBE = (
    Message("user", "Hello."),
    Message("assistant", "", tool_calls=(_CALL,)),
    Message("tool", "Rain.", name="look_up", tool_call_id="abcdefghi"),
    Message("assistant", "Good day."),
)
TOOL: Mapping[str, Any] = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}
"""A tool that templates can show."""


class Probe:
    """What is known of one template with one tokenizer; each fact is found when it is first asked for.

    Args:
        engine: the compiled template.
        tokenizer: whose added tokens can end a turn.
    """

    def __init__(self, engine: Engine, tokenizer: PreTrainedTokenizerBase) -> None:
        self._engine = engine
        self._tokenizer = tokenizer

    def dialogue(self, messages: Sequence[Message], tools: Tools) -> Dialogue:
        """A conversation in the form that the template wants."""
        calls = any(message.tool_calls for message in messages)
        return Dialogue(self._engine, messages, tools, self.tool_form if calls else self.form)

    # ---- how the template wants its messages

    @cached_property
    def form(self) -> Form:
        """Found by trying: whether texts appear, given as text or as a list of parts."""
        source, key = self._engine.source, None
        if re.search(r"\breasoning\b", source) and not re.search("reasoning_content|thinking", source):
            key = "reasoning"
        for parts in (False, True):
            form = Form(content_as_parts=parts, reasoning_key=key)
            for tools in ((), (TOOL,)):
                text = Dialogue(self._engine, _PROBE[:2], tools, form).final(1)
                if text is not None and "Good day." in text and "'Good day.'" not in text:
                    return form
        return Form(reasoning_key=key)

    @cached_property
    def tool_form(self) -> Form:
        """Found by trying: how arguments and content have to be given so that a tool call appears as it should."""
        base = self.form
        for count in (4, 2):
            for as_text, no_content in ((False, False), (False, True), (True, False), (True, True)):
                form = Form(as_text, no_content, base.content_as_parts, base.reasoning_key)
                text = Dialogue(self._engine, _TOOL_PROBE[:count], (TOOL,), form).final(count - 1)
                if text is not None and "Oslo" in text and "'place': 'Oslo'" not in text and '\\"place' not in text:
                    return form
        return base

    # ---- how it opens and ends turns

    @cached_property
    def added_token(self) -> re.Pattern[str]:
        """Finds an added token of the tokenizer, the longest first."""
        added = {token.content for token in self._tokenizer.added_tokens_decoder.values() if token.content.strip()}
        return re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))) or "(?!)")

    def _render(self, count: int, ask: bool = False) -> TracedStr:
        """The first messages of a plain little conversation; with a tool where the template wants one."""
        try:
            return self.dialogue(_PROBE[:count], ()).trace(count, ask)
        except TemplateError as error:
            text = self.dialogue(_PROBE[:count], (TOOL,))
            traced = text.traced_prompt(count) if ask else text.traced_final(count - 1)
            if traced is None:
                raise error
            return traced

    def _tail(self, count: int, index: int, ask: bool = False) -> str:
        """Text after the content of a probe's message, up to the next message's content."""
        text = self._render(count, ask)
        end = max((span.end for span in text.spans if owner(span.origin) == index), default=len(text))
        after = min((s.start for s in text.spans if s.start >= end and owner(s.origin) != index), default=len(text))
        return str.__str__(text)[end:after]

    def _head(self) -> list[str]:
        """The added tokens before the first user's text."""
        text = self._render(1)
        first = min((span.start for span in text.spans), default=0)
        return self.added_token.findall(str.__str__(text)[:first])

    @cached_property
    def generation_prompt(self) -> str:
        """What the template appends when asked to prompt for a reply."""
        asked, unasked = self._tail(1, 0, True), self._tail(1, 0)
        return asked[len(Words(self.added_token).whole(asked[: common_length(asked, unasked)], asked)) :]

    @cached_property
    def turn_ending(self) -> str:
        """What the template writes after the content of a final assistant turn."""
        ending, opening = self._tail(2, 1), self._opening_token
        return ending.partition(opening)[0] if opening else ending

    @cached_property
    def _opening_token(self) -> str | None:
        """The token with which the template opens a turn, if it prompts for replies without being asked."""
        tokens = [] if self.generation_prompt else [t for t in self._head() if t != self._tokenizer.bos_token]
        return tokens[0] if tokens else None

    @cached_property
    def words(self) -> Words:
        """All of this, for finding turns."""
        bos, eos = self._tokenizer.bos_token, self._tokenizer.eos_token
        try:
            return Words(
                tokens=self.added_token,
                bos=bos,
                eos=eos,
                prompt=self.generation_prompt,
                opening=self._opening_token,
                ending=self.turn_ending,
                ends_midway=self.added_token.match(self._tail(3, 1).lstrip()) is not None,
                openers=frozenset(self._head()),
            )
        except TemplateError:  # it refuses the probes; what it renders still tells where turns begin and end
            return Words(self.added_token, bos, eos)

    @cached_property
    def end_tokens(self) -> tuple[str, ...]:
        """The tokens that end a turn, also one that calls a tool."""
        tokens = self.added_token.findall(self.turn_ending)
        tokens = tokens[-1:] or self.added_token.findall(self._tail(3, 1))[:1]
        tokens += self._end_of_call()
        return tuple(dict.fromkeys(token for token in tokens if token != self._tokenizer.bos_token))

    def _end_of_call(self) -> list[str]:
        """The special token with which the template ends a turn that calls a tool, if it has one."""
        text = self.dialogue(_TOOL_PROBE, (TOOL,)).traced_final(1)
        ends = [span.end for span in text.spans if owner(span.origin) == 1] if text is not None else []
        if text is None or not ends:
            return []
        tokens = self.added_token.findall(str.__str__(text)[max(ends) :])
        return [token for token in tokens[-1:] if token in self._tokenizer.all_special_tokens]

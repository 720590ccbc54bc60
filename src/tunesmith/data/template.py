"""The only place that turns messages into text and tokens, for training and for chat alike.

The tokenizer's own chat template renders the conversation with texts that remember where their characters come from
(``data/trace.py``). So it is known, for any template, which characters are an assistant's turn. A turn that is learned
begins where the template, asked to prompt for it, stops, and includes the text with which the template ends it
(``data/turns.py``). Rows of a shape that was seen before are rendered plainly and compared (``data/skeleton.py``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import meta

from tunesmith.data.dialogue import Dialogue, Engine
from tunesmith.data.marks import turns_by_marks
from tunesmith.data.probe import TOOL, Probe
from tunesmith.data.sandbox import ChatEnvironment
from tunesmith.data.skeleton import Shape, Skeleton, fill, learn, shape_of, with_known_trims
from tunesmith.data.tokenize import Text, TextEncoder
from tunesmith.data.trace import MARK, TracedStr
from tunesmith.data.turns import Found, Placed, Turn, TurnFinder, checked_turns
from tunesmith.data.wire import as_messages, owner
from tunesmith.data.words import merged, unshown
from tunesmith.errors import TemplateError
from tunesmith.types import Message, Tools

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHAPES_KEPT = 4096


@dataclass(frozen=True, slots=True)
class Certificate:
    """What was proven of a mask.

    Attributes:
        turns: what is learned of the assistant's turns; everything else is not.
        marked: whether ``{% generation %}`` marks of the template were followed.
        notes: what a person should know: content that the template rewrites, drops or trims, turns opened otherwise
            than in chat or without an end, tokens that reach across the beginning of a turn.
        everything: whether what is outside the assistant's turns is learned, too (``train_on_prompt``).
    """

    turns: tuple[Turn, ...]
    marked: bool
    notes: tuple[str, ...]
    everything: bool = False


@dataclass(frozen=True, slots=True)
class Rendered:
    """A rendered conversation.

    Attributes:
        text: what the model sees.
        turns: what is learned, in order, disjoint.
        data: character ranges that come from messages or tools, in order, disjoint.
        notes: what a person should know.
        marked: character ranges that the template marks with ``{% generation %}``.
    """

    text: str
    turns: tuple[Turn, ...]
    data: tuple[tuple[int, int], ...]
    notes: tuple[str, ...] = ()
    marked: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Encoded:
    """A tokenised conversation with its mask.

    Attributes:
        text: what the model sees.
        input_ids: its tokens.
        loss_mask: 1 for each token that is learned, else 0; not shifted.
        certificate: what was proven of the mask.
    """

    text: str
    input_ids: list[int]
    loss_mask: list[int]
    certificate: Certificate


class ChatTemplate:
    """The chat template of one tokenizer.

    Args:
        tokenizer: with a fast backend, and with a chat template unless ``source`` is given.
        date: ``YYYY-MM-DD`` that a template sees as today; the real one if None.
        source: Jinja text to use in place of the tokenizer's own.
        options: further variables for the template, such as ``enable_thinking``.

    Attributes:
        source: the Jinja text in use.
        encoder: tokenises what is rendered.

    Raises:
        TemplateError: no chat template, one that cannot be compiled, or no character offsets.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        date: str | None = None,
        source: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.date = date
        self.options = dict(options or {})
        name = tokenizer.name_or_path
        if not (source or tokenizer.chat_template):
            raise TemplateError(
                f"the tokenizer of {name!r} has no chat template; name one with template: "
                "(`tunesmith templates` lists them), or put a chat_template.jinja beside its tokenizer.json"
            )
        if not tokenizer.is_fast:
            raise TemplateError(f"the tokenizer of {name!r} has no character offsets (no fast backend)")
        try:
            self.source: str = source or tokenizer.get_chat_template()
            self._engine = Engine(self.source, date, {"documents": None, **tokenizer.special_tokens_map, **self.options})
        except (jinja2.TemplateError, ValueError) as error:
            raise TemplateError(f"the chat template of {name!r} cannot be read: {error}") from None
        self._probe = Probe(self._engine, tokenizer)
        self._with_tools = self._tool_variant(source)
        self._compared: set[object] = set()
        self._skeletons: dict[Shape, tuple[Skeleton, ...]] = {}
        self.encoder = TextEncoder(tokenizer)

    def _tool_variant(self, source: str | None) -> ChatTemplate | None:
        """A template of its own for conversations with tools, where the tokenizer brings one."""
        if source or not isinstance(self.tokenizer.chat_template, dict):
            return None
        chosen = self.tokenizer.get_chat_template(tools=[dict(TOOL)])
        return None if chosen == self.source else ChatTemplate(self.tokenizer, self.date, chosen, self.options)

    # ---- rendering

    def text(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """Text of the conversation, equal to ``apply_chat_template(..., tokenize=False)``.

        Raises:
            TemplateError: the template refuses the conversation.
        """
        if tools and self._with_tools:
            return self._with_tools.text(messages, tools, add_generation_prompt)
        known = as_messages(messages)
        return self._probe.dialogue(known, tuple(tools or ())).text(len(known), add_generation_prompt)

    def wired(self, messages: Sequence[Message], tools: Tools = ()) -> tuple[list[dict[str, Any]], list[Any] | None]:
        """Messages and tools in the form in which this template takes them, as ``apply_chat_template`` wants them."""
        dialogue = self._probe.dialogue(messages, tools)
        return dialogue.plain_messages, dialogue.plain_tools

    def rendered(self, messages: Sequence[Message], tools: Tools = ()) -> Rendered:
        """One rendering of the whole conversation, with every assistant turn whose weight is above 0.

        The first conversation of each shape is compared with transformers' own rendering.

        Raises:
            TemplateError: the template refuses the conversation, leaves out or mixes turns, or never ends one.
        """
        if tools and self._with_tools:
            return self._with_tools.rendered(messages, tools)
        dialogue = self._probe.dialogue(messages, tools)
        text, found = self._found(dialogue, len(messages), _learned(messages), False)
        for reason in found.missing.values():
            raise TemplateError(reason)
        return self._finish(text, dialogue, found.placed)

    def whole(self, messages: Sequence[Message], tools: Tools = ()) -> Rendered:
        """One rendering of the whole conversation, with every assistant turn that it shows, whatever its weight.

        Raises:
            TemplateError: the template refuses the conversation, or where a turn begins and ends in it cannot be told.
        """
        if tools and self._with_tools:
            return self._with_tools.whole(messages, tools)
        dialogue = self._probe.dialogue(messages, tools)
        turns = [index for index, message in enumerate(messages) if message.role == "assistant"]
        text, found = self._found(dialogue, len(messages), turns, True)
        shown = {owner(span.origin) for span in text.spans}
        for index, reason in found.missing.items():
            if index in shown:
                raise TemplateError(reason)
        return self._finish(text, dialogue, found.placed)

    def views(self, messages: Sequence[Message], tools: Tools = ()) -> list[Rendered]:
        """Renderings in which every assistant turn whose weight is above 0 is learned once, as serving would see it.

        One rendering where the template shows earlier turns as it showed them when they were the last. Where it does
        not (reasoning that is dropped later, another end), a turn is learned in the rendering that ends with it, and
        turns that are shown there as they were share it. A turn that in no rendering is what serving would see is
        learned as the template shows it, with a note.

        Up to eight assistant turns, each is compared with the prompt that serving would make and with the rendering
        that ends with it. In longer conversations the first, the last and number 2, 4, 8, ... are, so that the work
        grows with the length of the text; between them, turns are served if the template opens and ends them exactly
        as it does a checked turn of the same kind. For rows of a shape seen before, the same comparisons are made by
        plain rendering.

        Raises:
            TemplateError: as ``rendered``.
        """
        if tools and self._with_tools:
            return self._with_tools.views(messages, tools)
        dialogue = self._probe.dialogue(messages, tools)
        shape = None if tools or self._marks else shape_of(messages)
        if shape is not None and shape in self._skeletons:
            filled = [fill(skeleton, dialogue) for skeleton in self._skeletons[shape]]
            if all(f is not None for f in filled):
                return [
                    Rendered(f[0], tuple(f[2]), tuple(f[1]), skeleton.notes)
                    for f, skeleton in zip(filled, self._skeletons[shape], strict=True)
                    if f is not None
                ]
        learned = self._make_views(dialogue)
        if shape is not None:
            self._remember(shape, dialogue, learned)
        return [rendered for _, _, rendered in learned]

    def _make_views(self, dialogue: Dialogue) -> list[tuple[int, TracedStr, Rendered]]:
        messages = dialogue.messages
        rest, count = _learned(messages), len(messages)
        thorough = False
        views = []
        while True:
            text, found = self._found(dialogue, count, rest, thorough)
            if not thorough and (found.missing or not all(placed.best for placed in found.placed)):
                thorough = True
                text, found = self._found(dialogue, count, rest, thorough)
            forced = rest[-1] if rest and rest[-1] == count - 1 else None
            taken = [placed for placed in found.placed if placed.best or placed.turn.index == forced]
            if forced is not None and forced in found.missing:
                raise TemplateError(found.missing[forced])
            if taken or not rest:
                views.append((count, text, self._finish(text, dialogue, taken, count)))
            done = {placed.turn.index for placed in taken}
            rest = [index for index in rest if index not in done]
            if not rest:
                return views[::-1]
            count = rest[-1] + 1

    def _remember(self, shape: Shape, dialogue: Dialogue, views: Sequence[tuple[int, TracedStr, Rendered]]) -> None:
        checked = checked_turns(_learned(dialogue.messages), len(views) > 1)
        made = [learn(text, dialogue.messages[:count], r.turns, r.notes, checked) for count, text, r in views]
        skeletons = tuple(skeleton for skeleton in made if skeleton is not None)
        if len(skeletons) == len(views) and len(self._skeletons) < _SHAPES_KEPT:
            old = self._skeletons.get(shape, ())
            if len(old) == len(skeletons):
                skeletons = tuple(with_known_trims(a, b) for a, b in zip(skeletons, old, strict=True))
            self._skeletons[shape] = skeletons

    def _found(self, dialogue: Dialogue, count: int, indices: Sequence[int], thorough: bool) -> tuple[TracedStr, Found]:
        """Trace the first messages, compare with the library, find turns."""
        text = dialogue.trace(count)
        if dialogue.text(count) != text:
            raise TemplateError("the conversation renders differently when its texts are traced; please report this template")
        self._compare(dialogue, count, str.__str__(text))
        inside = [index for index in indices if index < count]
        if self._marks:
            return text, turns_by_marks(text, dialogue, count, inside, self._probe.words)
        finder = TurnFinder(text, count, dialogue, self._probe.words, checked_turns(inside, thorough))
        return text, finder.find(inside)

    def _finish(self, text: TracedStr, dialogue: Dialogue, placed: Sequence[Placed], count: int | None = None) -> Rendered:
        data = merged(span for span in text.spans if span.origin != MARK)
        marked = merged(span for span in text.spans if span.origin == MARK)
        notes = [note for one in placed for note in one.notes]
        notes += unshown(text, dialogue.messages[:count], bool(dialogue.plain_tools))
        if self._probe.tool_form.arguments_as_text and any(m.tool_calls for m in dialogue.messages[:count]):
            notes.append("the arguments of tool calls are given to the template as JSON text, since it shows no mappings")
        if dialogue.lost:
            notes.append("an operation of the template hides where text comes from; turns were found by comparing renderings")
        return Rendered(str.__str__(text), tuple(p.turn for p in placed), data, tuple(dict.fromkeys(notes)), marked)

    # ---- templates with marks

    @cached_property
    def _marks(self) -> bool:
        return re.search(r"\{%-?\s*generation\s*-?%\}", self.source) is not None

    # ---- comparison with the library

    def _compare(self, dialogue: Dialogue, count: int, text: str) -> None:
        """Compare with transformers once for each shape of conversation."""
        fields = tuple((*sorted(m), m["role"]) for m in dialogue.plain_messages[:count])
        shape = (fields, bool(dialogue.plain_tools))
        if shape not in self._compared:
            self._compare_now(dialogue, count, text)
            if len(self._compared) < _SHAPES_KEPT:
                self._compared.add(shape)

    def _compare_now(self, dialogue: Dialogue, count: int, text: str) -> None:
        """Raise TemplateError unless transformers renders the same text."""
        for _ in range(2):  # again if midnight fell between the two
            theirs = self.tokenizer.apply_chat_template(
                dialogue.plain_messages[:count],
                tools=dialogue.plain_tools,
                chat_template=self.source,
                tokenize=False,
                **self.options,
            )
            if theirs == (text if self.date is None or not self._dated else self._today(dialogue, count)):
                return
        raise TemplateError("the conversation renders differently in transformers; please report this template")

    @cached_property
    def _dated(self) -> bool:
        return "strftime_now" in self.source

    def _today(self, dialogue: Dialogue, count: int) -> str:
        """The text as of the real day, as transformers makes it."""
        engine = Engine(self.source, None, self._engine.constants)
        return engine.plain(dialogue.plain_messages[:count], dialogue.plain_tools, False)

    # ---- tokens

    def render(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Encoded:
        """Render, tokenise and mask a conversation; every assistant turn whose weight is above 0 is learned.

        Args:
            messages: as ``Message`` or as mappings in OpenAI's form.
            tools: JSON schemas of functions that the model may call.

        Returns:
            Text, tokens, and a mask with one 0 or 1 for each token, not shifted. A token belongs to the turn in which
            it begins. The text was compared with transformers' own rendering.

        Raises:
            TemplateError: the template refuses the conversation, leaves out or mixes turns, or never ends one.
        """
        if tools and self._with_tools:
            return self._with_tools.render(messages, tools)
        known, schemas = as_messages(messages), tuple(tools or ())
        rendered = self.rendered(known, schemas)
        self._compare_now(self._probe.dialogue(known, schemas), len(known), rendered.text)
        spans = tuple((turn.start, turn.end) for turn in rendered.turns)
        (tokens,) = self.encoder.encode([Text(rendered.text, spans, rendered.data)])
        mask = [0] * len(tokens.ids)
        for start, end in tokens.spans:
            mask[start:end] = [1] * (end - start)
        notes = rendered.notes
        if tokens.joined:
            notes += ("a token reaches from the prompt into a turn; it is not learned",)
        return Encoded(rendered.text, tokens.ids.tolist(), mask, Certificate(rendered.turns, bool(rendered.marked), notes))

    def prompt(self, messages: Sequence[Message | Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> Rendered:
        """The text that asks the model for its next turn; nothing of it is learned.

        Raises:
            TemplateError: the template refuses to.
        """
        if tools and self._with_tools:
            return self._with_tools.prompt(messages, tools)
        known = as_messages(messages)
        text = self._probe.dialogue(known, tuple(tools)).trace(len(known), ask=True)
        return Rendered(str.__str__(text), (), merged(span for span in text.spans if span.origin != MARK))

    def encode_prompt(
        self, messages: Sequence[Message | Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]:
        """Token ids that ask the model for its next turn. Raises TemplateError when the template refuses to."""
        rendered = self.prompt(messages, tools)
        (tokens,) = self.encoder.encode([Text(rendered.text, (), rendered.data)])
        return list(tokens.ids.tolist())

    # ---- what is known of the template

    @cached_property
    def unread(self) -> tuple[str, ...]:
        """The options that the template never looks at."""
        read = meta.find_undeclared_variables(ChatEnvironment().parse(self.source))
        also = set(self.options) - set(self._with_tools.unread) if self._with_tools else set()
        return tuple(name for name in self.options if name not in read | also)

    @property
    def generation_prompt(self) -> str:
        """What the template appends when asked to prompt for a reply. Raises TemplateError."""
        return self._probe.generation_prompt

    @property
    def turn_ending(self) -> str:
        """What the template writes after the content of a final assistant turn. Raises TemplateError."""
        return self._probe.turn_ending

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that end a turn: those that are learned, also after a tool call, and the end of sequence."""
        ids = {self.tokenizer.convert_tokens_to_ids(token) for token in self._probe.end_tokens}
        return tuple(sorted(ids | ({self.tokenizer.eos_token_id} - {None})))


def _learned(messages: Sequence[Message]) -> list[int]:
    return [index for index, message in enumerate(messages) if message.role == "assistant" and message.weight > 0]

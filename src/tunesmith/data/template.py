"""The only place that turns messages into text and tokens, for training and for chat alike.

The tokenizer's own chat template renders the whole conversation. What the model is to learn is found in that text:
an assistant turn begins where the template, asked to prompt for it, stops; it ends with the first special token
after its content. So the supervised text is what the model will have to produce, end-of-turn token included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jinja2
import numpy as np

from tunesmith.errors import TemplateError
from tunesmith.types import IGNORE_INDEX, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Rendered:
    """A rendered conversation: its text and the character spans that are learned."""

    text: str
    spans: tuple[tuple[int, int], ...]


class ChatTemplate:
    """The chat template of one tokenizer.

    Raises:
        TemplateError: the tokenizer has no chat template, or no fast backend with character offsets.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        if not tokenizer.chat_template:
            raise TemplateError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; "
                "put a chat_template.jinja beside its tokenizer.json"
            )
        if not tokenizer.is_fast:
            raise TemplateError(f"the tokenizer of {tokenizer.name_or_path!r} has no character offsets (no fast backend)")
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._special_tokens = sorted(special, key=len, reverse=True)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """Text of the conversation. Raises TemplateError when the template refuses it."""
        plain = [{"role": m.role, "content": m.content} for m in messages]
        try:
            text = self.tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=add_generation_prompt)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise TemplateError(f"the chat template refuses the conversation: {error}") from None
        assert isinstance(text, str)
        return text

    def render_supervised(self, messages: Sequence[Message]) -> Rendered:
        """Render and find the spans to learn. Raises TemplateError when a turn's span cannot be found for certain."""
        text = self.render(messages)
        spans = []
        for index, message in enumerate(messages):
            if message.role == "assistant":
                prompt = self.render(messages[:index], add_generation_prompt=True)
                if not text.startswith(prompt):
                    raise TemplateError(f"the template changes what stands before turn {index + 1} once the turn is there")
                spans.append((len(prompt), self._turn_end(text, len(prompt), message.content, index + 1)))
        return Rendered(text, tuple(spans))

    def _turn_end(self, text: str, start: int, content: str, number: int) -> int:
        stripped = content.strip()
        found = text.find(stripped, start)
        if found < 0:
            raise TemplateError(f"the template rewrites the content of turn {number}")
        content_end = found + len(stripped)
        ends = [(text.find(token, content_end), token) for token in self._special_tokens]
        ends = [(position, token) for position, token in ends if position >= 0]
        if not ends:
            raise TemplateError(
                f"no special token ends turn {number}, so the model would never learn to stop; "
                "add the end-of-sequence token after assistant turns in the chat template"
            )
        position, token = min(ends)
        return position + len(token)

    def encode(self, texts: Sequence[Rendered]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Tokenise rendered conversations.

        Returns:
            For each, ``input_ids`` and ``labels`` (int32 ``[L]``), labels not shifted, unsupervised tokens
            ``IGNORE_INDEX``. A token belongs to the span in which it begins.
        """
        encoded = self.tokenizer(
            [r.text for r in texts], add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False
        )
        pairs = []
        for rendered, ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            input_ids = np.asarray(ids, dtype=np.int32)
            starts = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)[:, 0]
            labels = np.full(len(input_ids), IGNORE_INDEX, dtype=np.int32)
            for begin, end in rendered.spans:
                inside = (starts >= begin) & (starts < end)
                labels[inside] = input_ids[inside]
            pairs.append((input_ids, labels))
        return pairs

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids that ask the model for its next turn."""
        text = self.render(messages, add_generation_prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

"""Answers from a model, streamed or whole. Every field of ``GeneratingArguments`` is honoured."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from threading import Event, Thread
from typing import Any

import torch
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from tunesmith.config.arguments import GeneratingArguments
from tunesmith.data.template import ChatTemplate
from tunesmith.errors import ModelError
from tunesmith.generate.logits import InvalidScoreLogitsProcessor
from tunesmith.model.adapter import unwrap
from tunesmith.model.settings import positions
from tunesmith.types import Message


class _StopWhen(StoppingCriteria):
    def __init__(self, event: Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


def end_ids(model: PreTrainedModel, template: ChatTemplate) -> list[int]:
    """Tokens that end an answer: of the model's own settings, and of the template."""
    configured = model.generation_config.eos_token_id
    own = configured if isinstance(configured, list) else [configured]
    return sorted({end for end in own if end is not None} | set(template.end_ids))


class ChatEngine:
    """Answers conversations with one model and its chat template.

    Args:
        model: base or adapted model, in evaluation mode, on standard attention.
        tokenizer: with a chat template.
        date: what the template takes for today; the real day if None.
        options: further variables for the template, such as ``enable_thinking``.

    Attributes:
        repairs: repairs scores that are no numbers, and counts them.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        date: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.model: Any = model
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, date, options=options)
        self.repairs = InvalidScoreLogitsProcessor()
        self._end_ids = end_ids(unwrap(model), self.template)

    def _inputs(self, messages: Sequence[Message], args: GeneratingArguments) -> dict[str, Any]:
        ids = self.template.encode_prompt(messages)
        longest = positions(self.model.config)
        if longest is not None and longest <= len(ids):
            raise ModelError(f"the conversation has {len(ids)} tokens, the model takes {longest}; start a new one")
        options = args.to_dict()
        if "max_new_tokens" in options and longest is not None:
            options["max_new_tokens"] = min(options["max_new_tokens"], longest - len(ids))
        elif options.get("max_length", len(ids) + 1) <= len(ids):
            raise ModelError(f"max_length {options['max_length']} leaves no room after a prompt of {len(ids)} tokens")
        prompt = torch.tensor([ids], device=self.model.device)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self._end_ids[0]
        neutral = {} if args.do_sample else {"temperature": None, "top_p": None, "top_k": None}
        return {
            "input_ids": prompt,
            "attention_mask": torch.ones_like(prompt),
            "eos_token_id": self._end_ids,
            "pad_token_id": pad,
            "logits_processor": LogitsProcessorList([self.repairs]),
            **neutral,
            **options,
        }

    @torch.no_grad()
    def answer(self, messages: Sequence[Message], args: GeneratingArguments) -> str:
        """The whole answer as text. Raises ModelError when the prompt is too long."""
        inputs = self._inputs(messages, args)
        output = self.model.generate(**inputs)
        return str(self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    def stream(self, messages: Sequence[Message], args: GeneratingArguments) -> Iterator[str]:
        """The answer in pieces, as they come; a beam search comes in one. Closing the iterator ends the work."""
        if args.num_beams > 1:
            yield self.answer(messages, args)
            return
        inputs = self._inputs(messages, args)
        stop = Event()
        failure: list[BaseException] = []
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)

        def work() -> None:
            try:
                with torch.no_grad():
                    criteria = StoppingCriteriaList([_StopWhen(stop)])
                    self.model.generate(**inputs, streamer=streamer, stopping_criteria=criteria)
            except BaseException as error:
                failure.append(error)
                streamer.end()

        thread = Thread(target=work, daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:
            stop.set()
            thread.join()
        if failure:
            raise failure[0]


@contextlib.contextmanager
def answering(model: torch.nn.Module, implementation: str) -> Iterator[None]:
    """Within this context a model that is being trained can generate; its mode, attention and RNG come back after.

    ``implementation`` is the attention that the model was loaded with.
    """
    base = unwrap(model)
    training, before = model.training, base.config._attn_implementation
    model.eval()
    base.set_attn_implementation(implementation)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        base.set_attn_implementation(before)
        model.train(training)

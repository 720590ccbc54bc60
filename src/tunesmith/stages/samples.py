"""Answers of the model in training, so that a person sees what changes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from tunesmith.config.arguments import GeneratingArguments, RunConfig
from tunesmith.generate.engine import ChatEngine, answering
from tunesmith.train.progress import Reporter
from tunesmith.types import Message


def sample_answers(
    config: RunConfig, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, when: str, reporter: Reporter
) -> list[dict[str, str]]:
    """Greedy answers to ``sample_prompts``, one line each, and the same as records."""
    greedy = GeneratingArguments(do_sample=False, max_new_tokens=config.training.sample_max_new_tokens)
    samples: list[dict[str, str]] = []
    if not config.training.sample_prompts:
        return samples
    with answering(model):
        engine = ChatEngine(model, tokenizer)
        for prompt in config.training.sample_prompts:
            answer = engine.answer(_conversation(prompt, config.data.default_system), greedy)
            reporter.note(f"{when}: {prompt}  ->  {' '.join(answer.split())}")
            samples.append({"when": when, "prompt": prompt, "answer": answer})
    return samples


def _conversation(prompt: str, system: str | None) -> Sequence[Message]:
    opening = [Message("system", system)] if system is not None else []
    return [*opening, Message("user", prompt)]

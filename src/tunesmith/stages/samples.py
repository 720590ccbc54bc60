"""Answers of the model in training, so that a person sees what changes."""

from __future__ import annotations

import json
from pathlib import Path

from tunesmith.config.arguments import GeneratingArguments, RunConfig
from tunesmith.generate.engine import ChatEngine, answering
from tunesmith.train.trainer import PeftTrainer
from tunesmith.types import Message


def sample_answers(config: RunConfig, trainer: PeftTrainer, when: str, file: Path) -> None:
    """Answer ``sample_prompts`` greedily: one line each to the reporter, one record each appended to ``file``."""
    if not config.training.sample_prompts:
        return
    greedy = GeneratingArguments(do_sample=False, max_new_tokens=config.training.sample_max_new_tokens)
    system = config.data.default_system
    opening = [Message("system", system)] if system is not None else []
    with answering(trainer.model, trainer.given.attention), file.open("a", encoding="utf-8") as sink:
        data = config.data
        engine = ChatEngine(trainer.model, trainer.given.tokenizer, data.template_date, data.template_options)
        for prompt in config.training.sample_prompts:
            answer = engine.answer([*opening, Message("user", prompt)], greedy)
            trainer.given.reporter.note(f"{when}: {prompt}  ->  {' '.join(answer.split())}")
            sink.write(json.dumps({"when": when, "prompt": prompt, "answer": answer}, ensure_ascii=False) + "\n")

"""Who takes part in a rollout beside the policy: what makes answers, what says their worth, and the reference."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from tunesmith.config.arguments import RunConfig
from tunesmith.config.rules import FREE_ON_RESUME
from tunesmith.data.kinds import Rows
from tunesmith.data.template import ChatTemplate
from tunesmith.errors import ConfigError
from tunesmith.generate.batch import BatchEngine
from tunesmith.generate.engine import end_ids
from tunesmith.generate.remote import OpenAIEngine, VllmEngine
from tunesmith.model.adapter import beneath_of, set_head, unwrap
from tunesmith.model.dropout import without_dropout
from tunesmith.model.forward import FlatForward
from tunesmith.model.heads import ValueHead, head_width
from tunesmith.model.lineage import Line, copy_beside
from tunesmith.model.roles import playing
from tunesmith.model.settings import positions
from tunesmith.model.source import locate
from tunesmith.stages.policy import Actors, PolicyIngredients
from tunesmith.stages.reference import reference_model
from tunesmith.stages.rewards import load_rewards
from tunesmith.stages.scores import policy_scores
from tunesmith.train.trainer import Ingredients
from tunesmith.types import Batch

REFERENCE = "reference"
"""Name of the starting adapter's copy on a shared trunk."""


def with_actors(config: RunConfig, given: Ingredients, line: Line) -> PolicyIngredients:
    """The ingredients of a policy's trainer.

    Args:
        config: of the run, of stage ppo or grpo.
        given: the model as training begins.
        line: what it goes on from.

    Raises:
        ConfigError: prompts that leave no room for an answer, or settings of the reward that do not suit the model.
        ModelError: the reward model or the reference cannot be loaded.
    """
    _check_room(config, given)
    _say_what_is_cut_off(config, given)
    without_dropout(unwrap(given.forward.model))
    if config.finetuning.stage == "ppo":
        set_head(given.forward.model, ValueHead(head_width(unwrap(given.forward.model))).to(given.device))
    rewards = load_rewards(config, given.forward, given.tokenizer)
    for rows in (given.train_examples, given.eval_examples):
        rewards.check(rows if isinstance(rows, Rows) else ())
    reference = reference_of(config, given, line) if config.policy.kl_coef else _no_reference
    engine = engine_of(config, given, line)
    sync = None if isinstance(engine, BatchEngine) else engine.sync
    actors = Actors(engine, rewards, reference, sync)
    own = {**vars(given), "inputs": {**given.inputs, **_answering(config)}}
    return PolicyIngredients(**own, policy=config.policy, generating=config.generating, actors=actors)


def _answering(config: RunConfig) -> dict[str, Any]:
    """What says how answers are made and what they are worth, which a run that is continued must not change."""
    model = {key: getattr(config.model, key) for key in ("reward_model", "reward_model_type")}
    said = {**config.policy.model_dump(mode="json"), **config.generating.model_dump(mode="json"), **model}
    return {key: value for key, value in said.items() if key not in FREE_ON_RESUME}


def engine_of(config: RunConfig, given: Ingredients, line: Line) -> BatchEngine | OpenAIEngine | VllmEngine:
    """What ``rollout_engine`` names. Raises ModelError where it cannot be used."""
    policy, model = config.policy, unwrap(given.forward.model)
    template = ChatTemplate(given.tokenizer, config.data.template_date, options=config.data.template_options)
    ends, longest = end_ids(model, template), positions(model.config)
    match policy.rollout_engine:
        case "local":
            return BatchEngine(given.forward, ends, given.compute_dtype, attention=given.attention)
        case "api":
            assert policy.rollout_url is not None
            return OpenAIEngine(policy.rollout_url, given.tokenizer, ends, longest)
        case "vllm":
            folder, dtype = str(locate(line.on(config.model)).path), str(given.compute_dtype).removeprefix("torch.")
            return VllmEngine(folder, ends, _rank(given.forward.model), dtype, longest)


def _rank(model: torch.nn.Module) -> int:
    """Of the adapter as it is saved, with all that it goes on from."""
    assert isinstance(model, PeftModel), "rules ask for adapters where another engine answers"
    own = getattr(model.active_peft_config, "r", 0)
    return int(own) + sum(max((len(down) for down, _ in factors.values()), default=0) for factors in beneath_of(model))


def _check_room(config: RunConfig, given: Ingredients) -> None:
    """Raise ConfigError where the longest prompt leaves no room for an answer."""
    most = positions(unwrap(given.forward.model).config)
    limits = [] if most is None else [most]
    if config.generating.max_new_tokens is None and config.generating.max_length is not None:
        limits.append(config.generating.max_length)
    for rows in (given.train_examples, given.eval_examples):
        if not isinstance(rows, Rows) or not limits:
            continue
        longest = int(np.argmax(rows.lengths))
        if rows.lengths[longest] >= min(limits):
            raise ConfigError(
                f"cutoff_len: the prompt of {rows[longest].source} has {rows.lengths[longest]:,} tokens, which leaves no room "
                f"for an answer within {min(limits):,}; lower cutoff_len, which bounds prompts in this stage"
            )


def _say_what_is_cut_off(config: RunConfig, given: Ingredients) -> None:
    """Tell that answers are drawn from less than what is learned about."""
    whole = {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    if cut := [key for key, value in whole.items() if getattr(config.generating, key) != value]:
        given.reporter.note(
            f"note: {', '.join(cut)}: answers are drawn from a part of the policy; log-probabilities are those of all of it"
        )


# ---- the reference


def reference_of(config: RunConfig, given: Ingredients, line: Line) -> Callable[[Batch, float], torch.Tensor]:
    """What answers as the reference does: the model that ``ref_model`` names, or the policy as training begins.

    An adapter that changes nothing yet is switched off for it, one that was trained before plays as a frozen copy of itself
    on the same trunk, and of a model whose own weights are trained a copy is kept.
    """
    if config.finetuning.ref_model is not None:
        return _Reference(reference_model(config, given))
    model = given.forward.model
    if not isinstance(model, PeftModel):
        frozen = copy.deepcopy(model).requires_grad_(False)
        size = sum(p.numel() * p.element_size() for p in frozen.parameters()) / (1 << 30)
        given.reporter.note(f"reference: a copy of the weights as training begins, {size:.2f} GiB")
        return _Reference(replace(given, forward=FlatForward(frozen, given.forward.segments, share=given.forward.share)))
    names = [name for name in model.base_model.active_adapters if name != "default"]
    if config.finetuning.finetuning_type != "lora" or config.finetuning.pissa_init or (line.adapters and line.resume):
        copy_beside(model, REFERENCE)
        names.append(REFERENCE)
    return _Reference(given, names)


class _Reference:
    """Called with a batch and a temperature; ``names``: adapters of the trunk that play, None: the model as it is."""

    def __init__(self, given: Ingredients, names: Sequence[str] | None = None) -> None:
        self._given, self._names = given, names

    @torch.no_grad()
    def __call__(self, batch: Batch, temperature: float) -> torch.Tensor:
        names = self._names
        with nullcontext() if names is None else playing(self._given.forward.model, *names):
            return policy_scores(self._given, batch, temperature)[0]


def _no_reference(batch: Batch, temperature: float) -> torch.Tensor:
    raise AssertionError("nothing is compared with a reference where kl_coef is 0")

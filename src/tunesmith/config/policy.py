"""What the stages that learn from their own answers take for granted, and what does not go together there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from tunesmith.config.arguments import (
    Arguments,
    DataArguments,
    FinetuningArguments,
    GeneratingArguments,
    ModelArguments,
    PolicyArguments,
    TrainingArguments,
)
from tunesmith.config.reward import REWARD_KEYS, function_of, function_problems, reward_problems
from tunesmith.rewards.shipped import SHIPPED, option_problems

POLICY_STAGES = ("ppo", "grpo")
SHIPPED_REWARDS = tuple(SHIPPED)
"""Names of reward functions that come with the package (``tunesmith/rewards``)."""

_COMMON: Mapping[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "max_new_tokens": 256,
    "metric_for_best_model": "eval_reward",
}
"""A policy learns from what it says itself; whatever is cut off its distribution it cannot learn about."""
STAGE_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "ppo": {**_COMMON, "ppo_epochs": 4, "num_generations": 1, "kl_coef": 0.05, "kl_estimator": "k1"},
    "grpo": {**_COMMON, "ppo_epochs": 1, "num_generations": 8, "kl_coef": 0.0, "kl_estimator": "k3"},
}
"""Stage -> key -> what it is if nothing is said."""

_ONLY = {
    "ppo": (
        "score_norm", "kl_control", "ppo_target", "kl_horizon", "gamma", "gae_lambda", "cliprange_value", "vf_coef",
        "whiten_rewards", "whiten_advantages",
    ),
    "grpo": ("grpo_loss", "scale_rewards", "group_baseline", "importance_level", "mask_truncated"),
}  # fmt: skip
"""Stage -> keys that no other stage heeds."""


def answers_of(training: TrainingArguments, policy: PolicyArguments) -> int:
    """Answers of a rollout."""
    return training.per_device_train_batch_size * training.gradient_accumulation_steps * policy.ppo_buffer_size


@dataclass(frozen=True)
class RolloutSize:
    """How a run divides prompts, and the answers to them.

    Attributes:
        prompts: of a rollout; the last one of a pass over the prompts may have fewer.
        samples: answers to each prompt.
        batch: answers of a micro-batch.
        accumulation: micro-batches of an update.
        passes: how often each rollout is learned from.
    """

    prompts: int
    samples: int
    batch: int
    accumulation: int
    passes: int

    @classmethod
    def of(cls, training: TrainingArguments, policy: PolicyArguments) -> RolloutSize:
        """What the settings of a run say."""
        samples, batch = policy.num_generations or 1, training.per_device_train_batch_size
        accumulation = training.gradient_accumulation_steps
        return cls(answers_of(training, policy) // samples, samples, batch, accumulation, policy.ppo_epochs or 1)

    def updates(self, prompts: int) -> int:
        """Of a rollout of so many prompts."""
        return self.passes * ceil(ceil(prompts * self.samples / self.batch) / self.accumulation)

    def updates_per_epoch(self, rows: int) -> int:
        """Of a pass over so many prompts, if no rollout is left early."""
        whole, rest = divmod(rows, self.prompts)
        return whole * self.updates(self.prompts) + self.updates(rest)


def longest_answer(policy: PolicyArguments, generating: GeneratingArguments, prompt: int = 0) -> int:
    """Tokens that an answer to a prompt of so many can have."""
    limits = [policy.response_lengths[1]] if policy.response_lengths else []
    if generating.max_new_tokens is not None:
        limits.append(generating.max_new_tokens)
    elif generating.max_length is not None:
        limits.append(max(generating.max_length - prompt, 1))
    return min(limits)


def reward_files(model: ModelArguments, policy: PolicyArguments) -> list[Path]:
    """Files of Python functions that rewards name and that are there."""
    named = [name for name in policy.reward_functions if name not in SHIPPED_REWARDS]
    named += [model.reward_model] if model.reward_model is not None and model.reward_model_type == "function" else []
    return sorted({path for name in named if (path := function_of(name)[0]).is_file()})


def policy_violations(sections: Mapping[str, Arguments], finetuning: FinetuningArguments) -> Iterator[tuple[str, str]]:
    """Yield (key, message) for every rule of rollouts that the sections break. Sections that did not parse are absent."""
    policy, stage = sections.get("policy"), finetuning.stage
    if not isinstance(policy, PolicyArguments):
        return
    model, data = sections.get("model"), sections.get("data")
    training, generating = sections.get("training"), sections.get("generating")
    model = model if isinstance(model, ModelArguments) else None
    training = training if isinstance(training, TrainingArguments) else None
    generating = generating if isinstance(generating, GeneratingArguments) else None
    yield from _policy_rules(stage, policy, model, training, generating)
    if stage in POLICY_STAGES:
        yield from _engine_rules(policy, model, finetuning)
        if isinstance(data, DataArguments):
            yield from _data_rules(stage, data, finetuning, policy)


def _policy_rules(
    stage: str,
    policy: PolicyArguments,
    model: ModelArguments | None,
    training: TrainingArguments | None,
    generating: GeneratingArguments | None,
) -> Iterator[tuple[str, str]]:
    """Yield (key, message) for what is wrong with the settings of rollouts and rewards."""
    if stage not in POLICY_STAGES:
        for key in type(policy).model_fields:
            if not _as_default(policy, key):
                yield key, f"has no meaning with stage: {stage}, only with stage: ppo or grpo; remove the key"
        return
    for other, keys in _ONLY.items():
        for key in keys if other != stage else ():
            if not _as_default(policy, key):
                yield key, f"has no meaning with stage: {stage}, only with stage: {other}; remove the key"
    yield from _reward_rules(policy, model)
    if (policy.rollout_engine == "api") != (policy.rollout_url is not None):
        yield "rollout_url", "belongs to rollout_engine: api; give both, or neither"
    limits = policy.response_lengths
    if limits and not (len(limits) == 2 and 0 < limits[0] <= limits[1]):
        yield "response_lengths", f"expected [least, most], both above 0; found {list(limits)}"
    if policy.kl_control == "adaptive" and not policy.kl_coef:
        yield "kl_control", "adaptive starts from kl_coef, which is 0; give one above 0"
    if policy.kl_control != "adaptive":
        for key in ("ppo_target", "kl_horizon"):
            if not _as_default(policy, key):
                yield key, "belongs to kl_control: adaptive; remove the key"
    if not policy.kl_coef and policy.kl_estimator not in (None, STAGE_DEFAULTS[stage]["kl_estimator"]):
        yield "kl_estimator", "has no meaning with kl_coef: 0, where no divergence counts; give kl_coef, or remove the key"
    elif stage == "grpo" and policy.kl_estimator == "k1":
        yield "kl_estimator", "k1 has a gradient of mean 0 as a loss, so it holds nothing back; take k3 or k2"
    if stage == "grpo":
        yield from _group_rules(policy, training)
    elif training is not None and answers_of(training, policy) % (policy.num_generations or 1):
        yield "num_generations", _uneven(policy, training)
    if generating is not None:
        if not generating.do_sample:
            yield "do_sample", f"stage {stage} learns from sampled answers; remove the key"
        if generating.max_new_tokens is None and generating.max_length is None and not policy.response_lengths:
            yield "max_new_tokens", "nothing says how long an answer can be; give it, or max_length"
        if generating.num_beams > 1:
            yield "num_beams", f"stage {stage} learns from sampled answers, not from a search; remove the key"
    if training is not None and training.group_by_length:
        yield "group_by_length", "a rollout is of prompts in random order, and is sorted by itself; remove the key"
    if training is not None and training.neftune_noise_alpha is not None:
        yield (
            "neftune_noise_alpha",
            f"noise makes the policy another one in each pass, and stage {stage} compares passes; remove it",
        )


def _group_rules(policy: PolicyArguments, training: TrainingArguments | None) -> Iterator[tuple[str, str]]:
    if (policy.num_generations or 0) < 2:
        yield "num_generations", "a group of one answer says nothing about it; give 2 or more"
    elif training is not None and answers_of(training, policy) % (policy.num_generations or 1):
        yield "num_generations", _uneven(policy, training)


def _uneven(policy: PolicyArguments, training: TrainingArguments) -> str:
    return (
        f"{answers_of(training, policy)} answers of a rollout (per_device_train_batch_size x gradient_accumulation_steps x "
        f"ppo_buffer_size) are not a multiple of {policy.num_generations} answers to each prompt"
    )


def _reward_rules(policy: PolicyArguments, model: ModelArguments | None) -> Iterator[tuple[str, str]]:
    for name in policy.reward_functions:
        if name in SHIPPED_REWARDS:
            continue
        path, function = function_of(name)
        if not function and path.suffix != ".py":
            known = ", ".join(SHIPPED_REWARDS)
            yield "reward_functions", f"no function named {name!r}; there are {known}, or give path/to/file.py:name"
        else:
            yield from (("reward_functions", message) for message in function_problems(name))
    for name in policy.reward_options:
        if name not in policy.reward_functions or name not in SHIPPED_REWARDS:
            yield "reward_options", f"{name!r} is not among the shipped functions of reward_functions"
    for name in policy.reward_functions:
        if name in SHIPPED_REWARDS:
            yield from (("reward_options", message) for message in option_problems(name, policy.reward_options.get(name, {})))
    if model is None:
        return
    if model.reward_model is not None:
        yield from reward_problems(model)
        return
    if not policy.reward_functions:
        yield "reward_model", "nothing says what an answer is worth; give reward_model, or reward_functions"
    for key in (*REWARD_KEYS, "reward_weight"):
        section = policy if key == "reward_weight" else model
        if not _as_default(section, key):
            yield key, "has no meaning without reward_model; remove the key"


def _engine_rules(
    policy: PolicyArguments, model: ModelArguments | None, finetuning: FinetuningArguments
) -> Iterator[tuple[str, str]]:
    """Yield (key, message) for what cannot be handed to another engine: it takes an adapter for the base as it is."""
    engine = policy.rollout_engine
    if engine == "local":
        return
    for key in ("use_dora", "additional_target"):
        if getattr(finetuning, key):
            yield (
                key,
                f"vLLM takes plain LoRA only, and rollout_engine is {engine}; remove the key, or set rollout_engine: local",
            )
    if engine == "vllm" and model is not None and model.quantization_bit is not None:
        yield (
            "rollout_engine",
            "vllm runs the base as it is, and here it is quantised, which is another policy; set it to local",
        )


def _data_rules(
    stage: str, data: DataArguments, finetuning: FinetuningArguments, policy: PolicyArguments
) -> Iterator[tuple[str, str]]:
    """Yield (key, message) for settings of data and tuning that do not go with rollouts."""
    if policy.rollout_engine != "local" and finetuning.finetuning_type != "lora":
        yield "rollout_engine", f"{policy.rollout_engine} is given an adapter before each rollout; set finetuning_type: lora"
    if finetuning.ref_model is not None and not policy.kl_coef:
        yield (
            "ref_model",
            "has no meaning with kl_coef: 0, where nothing is compared with it; give kl_coef, or remove the key",
        )
    for key in ("packing", "streaming"):
        if getattr(data, key):
            yield key, f"stage {stage} reads prompts, one by one; remove the key"
    if finetuning.lora_dropout:
        yield "lora_dropout", f"dropout makes the policy another one in each pass, and stage {stage} compares passes; remove it"


def _as_default(section: Any, key: str) -> bool:
    field = type(section).model_fields[key]
    return bool(getattr(section, key) == field.get_default(call_default_factory=True))

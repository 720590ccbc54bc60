"""Answers made in training: how many, what they are worth, and how the policy learns from them (stages ppo and grpo)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from tunesmith.config.arguments.base import Arguments, weighted


class PolicyArguments(Arguments):
    """Rollouts, rewards and policy optimisation."""

    ppo_buffer_size: int = Field(
        1, gt=0, description="Mini-batches of a rollout. A mini-batch is what one update learns from: "
        "per_device_train_batch_size x gradient_accumulation_steps answers.",
    )  # fmt: skip
    ppo_epochs: int | None = Field(
        None, gt=0, description="Passes over the answers of a rollout; 4 in stage ppo, 1 in stage grpo if unset."
    )
    num_generations: int | None = Field(
        None, gt=0, description="Answers to each prompt; 1 in stage ppo, 8 in stage grpo if unset."
    )
    rollout_engine: Literal["local", "vllm", "api"] = Field(
        "local",
        description="What makes the answers. local: the model that is trained, in this process. vllm: vLLM in this process, "
        "given the adapter before each rollout. api: a server that speaks the OpenAI API and loads adapters (rollout_url).",
    )
    rollout_url: str | None = Field(None, description="rollout_engine: api: address, e.g. http://127.0.0.1:8000/v1.")
    response_lengths: tuple[int, ...] = Field(
        (),
        max_length=2,
        description="[least, most]: the limit of new tokens is drawn between these for each prompt; evaluation takes most.",
    )
    reward_functions: Annotated[dict[str, float], BeforeValidator(weighted)] = Field(
        default_factory=dict,
        description="Reward functions with their weights (math_answer: 1, format: 0.2): shipped ones (see the guide) or "
        "path/to/file.py:name. Their sum is added to reward_model's score, if there is one.",
    )
    reward_options: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="Options of the shipped functions, by name, e.g. {length: {target: 200}}."
    )
    reward_weight: float = Field(1.0, gt=0, description="Weight of reward_model's score beside reward_functions.")
    reward_clip: float | None = Field(None, gt=0, description="Rewards are kept between minus this and this.")
    score_norm: bool = Field(
        True,
        description="ppo: divide rewards by their running standard deviation (before reward_clip), so that kl_coef and the "
        "value loss mean the same whatever rewards are made of.",
    )
    missing_eos_penalty: float = Field(0.0, ge=0, description="Taken off the reward of an answer that did not end.")
    kl_coef: float | None = Field(
        None, ge=0, description="Weight of the divergence from the reference; 0.05 in stage ppo, 0 in stage grpo if unset."
    )
    kl_estimator: Literal["k1", "k2", "k3"] | None = Field(
        None, description="How it is estimated from a token: k1: -log r, k2: (log r)^2 / 2, k3: r - 1 - log r, with "
        "r = reference / policy; k1 in stage ppo, k3 in stage grpo if unset.",
    )  # fmt: skip
    kl_control: Literal["fixed", "adaptive"] = Field(
        "fixed", description="ppo. adaptive: kl_coef is steered so that an answer's divergence comes to ppo_target."
    )
    ppo_target: float = Field(6.0, gt=0, description="kl_control: adaptive: divergence of an answer to aim at, in nats.")
    kl_horizon: float = Field(10000.0, gt=0, description="kl_control: adaptive: answers over which the coefficient adapts.")
    target_kl: float | None = Field(
        None,
        gt=0,
        description="Leave the rest of a rollout when the policy is further, in nats per token, from the one that made it.",
    )
    gamma: float = Field(1.0, gt=0, le=1, description="ppo: discount of later rewards.")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="ppo: lambda of generalised advantage estimation.")
    cliprange: float = Field(0.2, gt=0, lt=1, description="The policy's ratio is clipped at 1 minus this, and 1 plus this.")
    cliprange_high: float | None = Field(
        None, gt=0, description="Upper bound of its own: 1 plus this (DAPO's clip-higher: 0.28)."
    )
    cliprange_value: float = Field(0.2, gt=0, description="ppo: how far a value may move from that of the rollout.")
    vf_coef: float = Field(0.1, ge=0, description="ppo: weight of the value loss.")
    entropy_coef: float = Field(0.0, ge=0, description="Weight of the entropy bonus.")
    whiten_rewards: bool = Field(False, description="ppo: divide token rewards of a rollout by their standard deviation.")
    whiten_advantages: bool = Field(True, description="ppo: advantages of a rollout get mean 0 and deviation 1.")
    grpo_loss: Literal["grpo", "dapo", "dr_grpo"] = Field(
        "dapo",
        description="grpo: mean over the tokens of an answer, then over answers. dapo: mean over all tokens. dr_grpo: sum over "
        "tokens divided by the longest answer's limit, mean over answers.",
    )
    scale_rewards: Literal["group", "batch", "none"] = Field(
        "group", description="grpo: what advantages are divided by: the deviation of their group, of the rollout, or nothing."
    )
    group_baseline: Literal["mean", "leave_one_out"] = Field(
        "mean", description="grpo: what is taken off a reward: the mean of its group, or that of the others (RLOO)."
    )
    importance_level: Literal["token", "sequence"] = Field(
        "token", description="grpo: ratio of each token, or one of the whole answer (GSPO)."
    )
    mask_truncated: bool = Field(False, description="grpo: answers that did not end are not learned from (DAPO).")

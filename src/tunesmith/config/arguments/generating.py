"""How answers are generated."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from tunesmith.config.arguments.base import Arguments


class GeneratingArguments(Arguments):
    """How answers are generated, in chat and in training."""

    do_sample: bool = Field(True, description="Sample; false: always the likeliest token.")
    temperature: float = Field(0.7, gt=0, description="Above 1 flatter, below 1 sharper; in stages ppo and grpo 1 if unset.")
    top_p: float = Field(
        0.9, gt=0, le=1, description="Sample from the smallest set of tokens with this probability; ppo and grpo: 1 if unset."
    )
    top_k: int = Field(50, ge=0, description="Sample from the k likeliest tokens; 0: all, as in ppo and grpo if unset.")
    num_beams: int = Field(1, gt=0, description="Beams of a beam search; 1: none.")
    max_length: int | None = Field(None, gt=0, description="Longest prompt plus answer, in tokens.")
    max_new_tokens: int | None = Field(
        512,
        gt=0,
        description="Longest answer, in tokens. If unset: no limit where max_length is given, else 256 in ppo and grpo. "
        "Wins over max_length.",
    )
    repetition_penalty: float = Field(1.0, gt=0, description="Above 1 discourages tokens that have already appeared.")
    length_penalty: float = Field(1.0, description="Beam search: above 0 favours longer answers.")

    @model_validator(mode="before")
    @classmethod
    def _only_max_length(cls, values: Any) -> Any:
        """Where ``max_length`` alone is given, the default of the other does not win over it."""
        alone = isinstance(values, dict) and values.get("max_length") is not None and "max_new_tokens" not in values
        return {**values, "max_new_tokens": None} if alone else values

    def to_dict(self) -> dict[str, Any]:
        """Keyword arguments of ``generate``: without max_length where max_new_tokens is set, without unset keys."""
        values = self.model_dump(exclude_none=True)
        if "max_new_tokens" in values:
            values.pop("max_length", None)
        if not self.do_sample:
            for key in ("temperature", "top_p", "top_k"):
                values.pop(key)
        if self.num_beams == 1:
            values.pop("length_penalty")
        return values

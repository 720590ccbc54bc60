"""Which model, and how it is loaded."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from tunesmith.config.arguments.base import Arguments, NameList


def _null_is_no(value: Any) -> Any:
    return False if value is None else value


class ModelArguments(Arguments):
    """Which model, and how it is loaded."""

    model_name_or_path: str = Field(
        min_length=1,
        description="Model folder, GGUF file, run folder, hub id (org/name; ms:org/name: of ModelScope), or a built-in model: "
        "builtin:smollm2-135m. An adapter is merged into its base.",
    )
    model_revision: str = Field("main", description="Branch, tag or commit of a hub model.")
    cache_dir: str | None = Field(None, description="Where hub downloads are kept; the hub library's own place if unset.")
    use_auth_token: bool | None = Field(
        None, description="true: the stored hub token (or HF_TOKEN) must be sent; false: never. Unset: if there is one."
    )
    use_fast_tokenizer: bool = Field(True, description="Use the Rust tokenizer. Loss masks need its character offsets.")
    trust_remote_code: Annotated[bool, BeforeValidator(_null_is_no)] = Field(
        False,
        description="Run Python code that comes with model_name_or_path, and with nothing else. Only for code you have read.",
    )
    compute_dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto",
        description="Arithmetic of the forward and backward pass. auto: bf16 where the processor multiplies it natively, "
        "else fp32. The keys bf16 and fp16 say the same thing.",
    )
    attn_implementation: Literal["auto", "sdpa", "eager"] = Field(
        "auto",
        description="auto: rows are computed end to end without padding where the model allows it. "
        "sdpa, eager: the library's attention on padded rows.",
    )
    quantization_bit: Literal[4, 8] | None = Field(
        None, description="Hold the base's linear layers in 8 or 4 bits (bitsandbytes); adapters are trained on top."
    )
    quantization_type: Literal["nf4", "fp4"] = Field("nf4", description="Numbers of the 4-bit format (arXiv 2305.14314).")
    double_quantization: bool = Field(True, description="Quantise the scales of the 4-bit format too.")
    upcast_layernorm: bool | None = Field(
        None, description="Hold the weights of normalisations in fp32. Unset: where the base is quantised."
    )
    layer_norm_names: NameList = Field(
        ("norm", "ln_f", "ln_attn", "ln_mlp", "ln_1", "ln_2"), description="Parts of the names of such weights."
    )
    checkpoint_dir: NameList = Field(
        (),
        description="Folders to go on from, in order: finished runs or their checkpoints (adapters, trained weights), or first "
        "a whole model.",
    )
    resume_lora_training: bool = Field(
        True,
        description="Train the last adapter of checkpoint_dir on. false: a new adapter on top of it. Earlier ones are merged "
        "into the base, or kept beside if it is quantised.",
    )
    reward_model: str | None = Field(
        None,
        min_length=1,
        description="What scores answers: a folder, path/to/file.py:name, or an address (see reward_model_type). For "
        "stages ppo and grpo.",
    )
    reward_model_type: Literal["lora", "full", "function", "api"] = Field(
        "lora",
        description="lora: an adapter with value_head.safetensors beside it, on model_name_or_path. full: a whole model with "
        "that file, or a sequence classifier of one label. function: name(prompts, responses) of a Python file, which is run; "
        "it returns a list of floats. api: a server that takes the same as JSON.",
    )
    reward_timeout: float | None = Field(
        None, gt=0, description="reward_model_type: api: seconds to wait for an answer; 60 if unset."
    )
    add_tokens: NameList = Field((), description="Tokens added to the tokenizer; their rows are learned with the adapter.")
    add_special_tokens: NameList = Field((), description="The same for special tokens, which decoding can leave out.")
    resize_vocab: bool = Field(
        False,
        description="Give rows to a tokenizer that has more tokens than the model. Tokens that are added have them anyway.",
    )
    plot_loss: bool = Field(True, description="Draw training_loss.png from the log at the end of the run.")

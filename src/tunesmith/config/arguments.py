"""The argument classes: one frozen pydantic model per concern, keys named as Transformers and LLaMA-Factory name them.

A field's documentation is its description; ``tunesmith config`` prints it. Rules that join several fields live in
``config/rules.py``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from tunesmith.config.optimizers import OPTIMIZERS, OptimizerName


def _split_commas(value: Any) -> Any:
    if value is None:
        return ()
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _split_options(value: Any) -> Any:
    """``"rank=128, scale=0.25"``, as Transformers writes it, -> a mapping of texts."""
    if value is None:
        return {}
    if not isinstance(value, str):
        return value
    pairs = [part.partition("=") for part in value.split(",") if part.strip()]
    if any(not (key.strip() and equals and text.strip()) for key, equals, text in pairs):
        raise ValueError("expected a mapping, or key=value pairs with commas between them")
    return {key.strip(): text.strip() for key, _, text in pairs}


def _bare_no(value: Any) -> Any:
    return "no" if value is False else value


def _null_is_no(value: Any) -> Any:
    return False if value is None else value


When = Annotated[Literal["no", "steps", "epoch"], BeforeValidator(_bare_no)]
"""When to do something. YAML reads a bare ``no`` as false; both are understood."""


def _weighted(value: Any) -> Any:
    """``sigmoid`` or ``sigmoid: 1, sft: 0.2`` -> name -> weight."""
    if not isinstance(value, str):
        return value
    parts = [part.partition(":") for part in value.split(",") if part.strip()]
    weights = {name.strip(): weight.strip() if colon else 1.0 for name, colon, weight in parts}
    if len(weights) < len(parts):
        raise ValueError("names a loss twice; give each once, with its weight")
    return weights


ClassWeight = Annotated[float, Field(gt=0)] | Literal["balanced"]
"""Weight of one of two classes, or what makes both count alike."""

NameList = Annotated[tuple[str, ...], BeforeValidator(_split_commas)]
"""A list of names; a YAML list or one string with commas."""


class Arguments(BaseModel):
    """Base of all argument classes: frozen, no unknown key, no NaN, no silent change of type."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=(), use_attribute_docstrings=False
    )

    def save_to_json(self, path: str | Path) -> None:
        """Write the fields to ``path`` as JSON, keys sorted."""
        text = json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True, ensure_ascii=False)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load_from_json(cls, path: str | Path) -> Arguments:
        """Read what ``save_to_json`` wrote. Raises pydantic's ``ValidationError`` on a wrong value."""
        return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))


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
        "load_reward_model in Python; no stage of this version takes it.",
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


class DatasetAttr(Arguments):
    """One data set: an entry of ``dataset_info.json``, or a path given in its place."""

    dataset_name: str = Field(description="Name under which dataset_info.json lists it, or the path given instead.")
    load_from: Literal["file", "hf_hub", "ms_hub"] = Field("file", description="A local file or folder, or a hub.")
    file_name: str | None = Field(None, min_length=1, description="File or folder inside dataset_dir.")
    inline: bool = Field(False, description="The path was given in the configuration; it may lie anywhere.")
    hub_url: str | None = Field(None, min_length=1, description="Name on the hub (org/name).")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub.")
    subset: str | None = Field(None, description="Configuration of a hub set.")
    split: str = Field("train", description="Split of a hub set or of a folder in the hub's layout.")
    folder: str | None = Field(None, description="Folder inside a hub set.")
    dataset_sha1: str | None = Field(None, pattern="^[0-9a-fA-F]{40}$", description="SHA-1 that the file must have.")
    dataset_sha256: str | None = Field(None, pattern="^[0-9a-fA-F]{64}$", description="SHA-256 that the file must have.")
    formatting: Literal["auto", "alpaca", "sharegpt", "openai", "text"] = Field(
        "alpaca", description="Layout of a row; auto: found from the rows."
    )
    ranking: bool = Field(False, description="Rows hold two answers, the better one and the worse one.")
    num_samples: int | None = Field(None, gt=0, description="Draw that many rows (seeded; repeated if there are fewer).")
    source_prefix: str = Field("", description="Text put before the first user turn of every row.")
    prompt_column: str | None = Field("instruction", description="Alpaca: the question. Text: the text.")
    query_column: str | None = Field("input", description="Alpaca: text that follows the question.")
    response_column: str | None = Field("output", description="Alpaca: the answer; with ranking, the two answers.")
    history_column: str | None = Field(None, description="Alpaca: earlier [question, answer] pairs.")
    system_column: str | None = Field(None, description="The system message, if the rows have one.")
    messages_column: str | None = Field("conversations", description="Sharegpt, openai: the list of turns.")
    tools_column: str | None = Field(None, description="Functions that the model may call, as JSON.")
    chosen_column: str | None = Field(None, description="Ranking: the better answer.")
    rejected_column: str | None = Field(None, description="Ranking: the worse answer.")
    margin_column: str | None = Field(None, description="Ranking: by how much the better answer is better, for stage rm.")
    kto_tag_column: str | None = Field(None, description="Whether the answer is good (true) or bad (false).")
    role_tag: str = Field("from", description="Key of a turn's speaker.")
    content_tag: str = Field("value", description="Key of a turn's text.")
    user_tag: str = Field("human", description="Speaker name of the user.")
    assistant_tag: str = Field("gpt", description="Speaker name of the model.")
    observation_tag: str = Field("observation", description="Speaker name of a tool that answers.")
    function_tag: str = Field("function_call", description="Speaker name of the model when it calls a tool.")
    system_tag: str = Field("system", description="Speaker name of a system turn.")


class DataArguments(Arguments):
    """Which rows are trained on, and how they become tokens."""

    dataset: NameList = Field(
        (), description="Names in dataset_info.json, paths of files, or hub sets (hf:org/name), in order, separated by commas."
    )
    eval_dataset: NameList = Field((), description="Names in dataset_info.json to evaluate on.")
    dataset_dir: str = Field("data", description="Folder that holds dataset_info.json and the files it names.")
    template: str = Field(
        "auto",
        min_length=1,
        description="Chat template. auto: the tokenizer's own; or a name that `tunesmith templates` lists; or a .jinja file.",
    )
    template_date: str | None = Field(
        None, pattern=r"^\d{4}-\d{2}-\d{2}$", description="Day that templates take for today; the day the run began if unset."
    )
    default_system: str | None = Field(None, description="System message for rows that have none.")
    enable_thinking: bool | None = Field(
        None,
        description="Given to the chat template as its variable of that name, in training and in chat. false: rows are learned "
        "without their reasoning. Unset: the template's own default.",
    )
    mask_history: bool = Field(False, description="Learn only the last assistant turn of each row; earlier ones are shown.")
    train_on_prompt: bool = Field(
        False, description="Learn all of each row: what system, user and tools say, as well as the assistant's turns."
    )
    cutoff_len: int = Field(2048, gt=1, description="Longest row in tokens (see truncation). In stage pt, tokens of a block.")
    truncation: Literal["keep_end", "keep_start", "split", "drop", "error"] = Field(
        "keep_end",
        description="Rows longer than cutoff_len. keep_end: the oldest turns go, then the head of the question; answers stay "
        "whole. keep_start: the end is cut off. split: several rows. drop: left out. error: the run ends. All are counted.",
    )
    on_bad_row: Literal["auto", "drop", "error"] = Field(
        "auto",
        description="auto: a row that cannot be read, or whose mask cannot be certified, ends the run; an empty or malformed "
        "one is left out and counted. drop: all such rows are left out. error: any of them ends the run.",
    )
    streaming: bool = Field(
        False,
        description="Read, tokenise and mask rows while training asks for them; nothing is stored. For sets larger than memory "
        "or disk. Needs max_steps.",
    )
    buffer_size: int = Field(
        16384,
        gt=0,
        description="streaming: rows that are shuffled, and packed, together. A buffer is full at 16.8 million tokens, too.",
    )
    max_samples: int | None = Field(None, gt=0, description="Use only the first N rows of each data set.")
    mix_strategy: Literal["concat", "interleave_under", "interleave_over"] = Field(
        "concat",
        description="Several sets: one after the other; or mixed until the first (under) or the last (over) is used up.",
    )
    interleave_probs: Annotated[tuple[float, ...], BeforeValidator(_split_commas)] = Field(
        (), description="Share of each set when mixed; by turns if unset."
    )
    preprocessing_num_workers: int | None = Field(
        None, ge=0, description="Processes that convert and tokenise rows; by threads of this one if unset."
    )
    overwrite_cache: bool = Field(False, description="Tokenise anew even if the rows have been tokenised before.")
    tokenized_path: str | None = Field(None, description="Where tokenised rows are kept; the user's cache if unset.")
    val_size: float = Field(
        0.0,
        ge=0,
        description="Hold out this share (below 1) or number (1 and up) of rows for evaluation; of a stream, its first rows.",
    )
    dev_ratio: float = Field(0.0, ge=0, lt=1, description="Hold out this share of rows; the same as val_size below 1.")
    source_prefix: str = Field(
        "", description="Text put before the first user turn; one for all sets, or one per set, divided by |."
    )
    identity_name: str | None = Field(None, description="Replaces {{name}} in the data.")
    identity_author: str | None = Field(None, description="Replaces {{author}} in the data.")
    packing: bool = Field(
        False,
        description="Fill each unit of a batch with rows up to cutoff_len tokens (first-fit decreasing). Rows never see "
        "each other; without it a unit is one row.",
    )
    disable_shuffling: bool = Field(False, description="Train in file order instead of a seeded order.")

    @property
    def template_options(self) -> dict[str, Any]:
        """Variables that are handed to the chat template."""
        return {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}


DataTrainingArguments = DataArguments


class FinetuningArguments(Arguments):
    """What is trained."""

    stage: Literal["pt", "sft", "rm", "dpo", "kto"] = Field(
        "sft",
        description="Training stage. pt: pretraining on plain text. sft: supervised fine-tuning on dialogues. rm: reward model "
        "on preference pairs. dpo: preference pairs learned directly (see pref_loss). kto: single answers found good or bad.",
    )
    pref_loss: Annotated[dict[str, float], BeforeValidator(_weighted)] = Field(
        {"sigmoid": 1.0},
        description="dpo: loss, or several with their weights (sigmoid: 1, sft: 0.2). Names: see the guide.",
    )
    pref_beta: float = Field(0.1, gt=0, description="dpo, kto: strength of the loss; how far from the reference.")
    pref_ftx: float = Field(
        0.0, ge=0, description="dpo, kto: weight of the chosen (good) answer's own loss (-log p, its tokens' mean)."
    )
    dpo_label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="dpo: share of pairs that are labelled wrongly.")
    simpo_gamma: float = Field(0.5, ge=0, description="dpo: margin of pref_loss: simpo.")
    discopop_tau: float = Field(0.05, gt=0, description="dpo: temperature of pref_loss: discopop.")
    ld_alpha: float | None = Field(
        None, ge=0, le=1, description="dpo: weight of the tokens by which one answer is longer than the other (LD-DPO)."
    )
    ref_model: str | None = Field(
        None, description="dpo, kto: reference model (folder, hub id or run); the model as training begins if unset."
    )
    share_prompts: bool = Field(
        True, description="rm, dpo: compute once what both answers of a pair begin with, instead of once for each."
    )
    kto_loss: Literal["kto", "apo_zero_unpaired"] = Field(
        "kto",
        description="kto: measured from how far the model has gone on answers to other prompts (arXiv 2402.01306). "
        "apo_zero_unpaired: measured from 0 (arXiv 2408.06266).",
    )
    kto_chosen_weight: ClassWeight = Field(
        1.0, description="kto: weight of good answers. balanced: all of them together count as much as all bad ones."
    )
    kto_rejected_weight: ClassWeight = Field(1.0, description="kto: weight of bad answers, or balanced.")
    reward_centering: float = Field(
        0.0, ge=0, description="rm: factor of (r_chosen + r_rejected)^2, which keeps rewards around 0 (0.01 is usual)."
    )
    finetuning_type: Literal["lora", "freeze", "full", "peft", "none"] = Field(
        "lora",
        description="lora: low-rank adapters. freeze: some layers (num_layer_trainable). full: all weights. peft: what "
        "peft_method names. none: nothing, for use without training.",
    )
    num_layer_trainable: int = Field(2, description="freeze: train the last n layers, or with a negative number the first n.")
    name_module_trainable: NameList = Field(
        ("all",), description="freeze: which modules of those layers, e.g. mlp or self_attn; all: whole layers."
    )
    freeze_extra_modules: NameList = Field(
        (), description="freeze: further modules outside the layers, e.g. embed_tokens, norm, lm_head."
    )
    peft_method: str | None = Field(None, description="peft: a method of the PEFT library by name, e.g. oft, ia3, vera, loha.")
    peft_args: dict[str, Any] = Field(default_factory=dict, description="peft: its options, e.g. {r: 8}.")
    lora_rank: int = Field(8, gt=0, description="Rank of the adapters.")
    lora_alpha: float | None = Field(None, gt=0, description="Scale of the adapters; twice the rank if unset.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapters' input.")
    lora_target: NameList = Field(
        ("all",),
        description="Layers to adapt, by name (q_proj), or one regular expression for full names; all: every linear layer of "
        "the text model, experts among them, but the output head.",
    )
    additional_target: NameList = Field(
        (), description="Modules trained whole beside the adapters and saved with them, e.g. embed_tokens, lm_head."
    )
    pissa_init: bool = Field(
        False, description="Start the adapters from the principal singular vectors (arXiv 2404.02948); saved as plain LoRA."
    )
    pissa_iter: int = Field(16, ge=-1, description="Iterations of the fast decomposition of pissa_init; -1: the exact one.")
    use_rslora: bool = Field(False, description="Rank-stabilised scale, alpha / sqrt(rank) (arXiv 2312.03732).")
    use_dora: bool = Field(False, description="Weight-decomposed adapters (arXiv 2402.09353).")
    loraplus_lr_ratio: float | None = Field(
        None, gt=0, description="LoRA+: B matrices learn at that many times learning_rate (arXiv 2402.12354)."
    )
    loraplus_lr_embedding: float | None = Field(
        None, gt=0, description="LoRA+: learning rate of adapters of an embedding; 1e-6 if unset."
    )


class TrainingArguments(Arguments):
    """How long, how fast, where to."""

    output_dir: str = Field(min_length=1, description="The run folder.")
    overwrite_output_dir: bool = Field(
        False, description="Start anew in a used run folder; removes only files that a run made."
    )
    do_train: Literal[True] = Field(True, description="Present for the ecosystem's YAML files; training is what train does.")
    per_device_train_batch_size: int = Field(4, gt=0, description="Rows in one forward pass.")
    per_device_eval_batch_size: int = Field(8, gt=0, description="Rows in one evaluation forward pass.")
    gradient_accumulation_steps: int = Field(1, gt=0, description="Forward passes summed into one update.")
    num_train_epochs: float = Field(3.0, gt=0, description="Passes over the data.")
    group_by_length: bool = Field(
        False, description="Batches of rows of similar length, the longest first: fewer pads where a model needs them."
    )
    max_steps: int = Field(-1, ge=-1, description="Number of updates; -1: from num_train_epochs.")
    learning_rate: float = Field(5e-5, gt=0, description="Peak learning rate.")
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
        "inverse_sqrt", "cosine_with_min_lr", "warmup_stable_decay",
    ] = Field("linear", description="Schedule, by Transformers' name; constant where unset with schedule_free_*.")  # fmt: skip
    lr_scheduler_kwargs: dict[str, float | int | str] = Field(
        default_factory=dict, description="Further arguments of the schedule, e.g. {min_lr: 1e-6}."
    )
    warmup_steps: int = Field(0, ge=0, description="Updates over which the learning rate rises.")
    warmup_ratio: float = Field(0.0, ge=0, le=1, description="The same as a share of all updates; warmup_steps wins.")
    optim: OptimizerName = Field("adamw_torch", description="Optimizer, by Transformers' name (the guide has a table).")
    optim_args: Annotated[dict[str, bool | int | float | str], BeforeValidator(_split_options)] = Field(
        default_factory=dict, description="Options of the optimizer, as a mapping or as rank=128,scale=0.25."
    )
    optim_target_modules: NameList = Field(
        (),
        description="Linear layers whose gradients galore_adamw and apollo_adamw project: names, or parts of them between "
        "dots; every one but the output head if unset (or all-linear).",
    )
    weight_decay: float = Field(0.0, ge=0, description="Decay of matrices; biases and norms are spared.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Adam's first moment.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="Adam's second moment.")
    adam_epsilon: float = Field(1e-8, gt=0, description="Adam's epsilon.")
    max_grad_norm: float = Field(1.0, ge=0, description="Clip the gradient to this L2 norm; 0: never.")
    neftune_noise_alpha: float | None = Field(
        None, gt=0, description="NEFTune: uniform noise on embeddings in training, at most alpha / sqrt(row length x width)."
    )
    gradient_checkpointing: bool | Literal["auto"] = Field(
        "auto",
        description="Recompute activations in the backward pass: less memory, slower. auto: only if it would not fit else.",
    )
    compile: bool | Literal["auto"] = Field(
        "auto",
        description="Compile what layers do between matrix products and attention (needs a C++ compiler, or Triton on a GPU). "
        "auto: on a CPU, if the run is long enough to win it back.",
    )
    use_liger_kernel: bool | Literal["auto"] = Field(
        "auto",
        description="Norms and gated layers by Liger's kernels. auto: on an NVIDIA GPU, if liger-kernel is installed.",
    )
    check_memory: bool = Field(True, description="Refuse to begin a run that is planned to need more memory than there is.")
    bf16: bool = Field(False, description="Same as compute_dtype: bf16.")
    fp16: bool = Field(False, description="Same as compute_dtype: fp16 (with loss scaling).")
    seed: int = Field(42, ge=0, lt=2**32, description="Seed of initialisation, dropout and, unless data_seed is set, order.")
    data_seed: int | None = Field(None, ge=0, lt=2**32, description="Seed of the split and of the order of rows.")
    logging_steps: int = Field(1, gt=0, description="Updates between two lines of trainer_log.jsonl.")
    eval_strategy: When = Field("no", description="When to evaluate.")
    eval_steps: int | None = Field(
        None, gt=0, description="Updates between evaluations; save_steps if unset. Setting it implies eval_strategy: steps."
    )
    eval_on_start: bool = Field(False, description="Evaluate once before the first update.")
    save_strategy: When = Field("steps", description="When to write a checkpoint.")
    save_steps: int = Field(500, gt=0, description="Updates between checkpoints.")
    save_total_limit: int | None = Field(None, gt=0, description="Keep that many checkpoints; the best and the last stay.")
    load_best_model_at_end: bool = Field(False, description="Finish with the weights of the best evaluation.")
    metric_for_best_model: Literal["eval_loss"] = Field("eval_loss", description="What best means: the lowest evaluation loss.")
    resume_from_checkpoint: str | bool | None = Field(
        None, description="auto (or true): the newest sound checkpoint of output_dir; or a checkpoint folder."
    )
    report_to: Literal["none"] = Field("none", description="Experiment tracker; trainer_log.jsonl is always written.")
    sample_prompts: tuple[str, ...] = Field((), description="Questions answered greedily before and after training.")
    sample_max_new_tokens: int = Field(80, gt=0, description="Longest of those answers, in tokens.")

    @model_validator(mode="before")
    @classmethod
    def _no_schedule_where_weights_are_averaged(cls, values: Any) -> Any:
        if isinstance(values, dict) and "lr_scheduler_type" not in values:
            optimizer = OPTIMIZERS.get(str(values.get("optim")))
            if optimizer and optimizer.averages:
                warms_up = values.get("warmup_steps") or values.get("warmup_ratio")
                return {**values, "lr_scheduler_type": "constant_with_warmup" if warms_up else "constant"}
        return values


class GeneratingArguments(Arguments):
    """How answers are generated in chat."""

    do_sample: bool = Field(True, description="Sample; false: always the likeliest token.")
    temperature: float = Field(0.7, gt=0, description="Above 1 flatter, below 1 sharper.")
    top_p: float = Field(0.9, gt=0, le=1, description="Sample from the smallest set of tokens with this probability.")
    top_k: int = Field(50, ge=0, description="Sample from the k likeliest tokens; 0: all.")
    num_beams: int = Field(1, gt=0, description="Beams of a beam search; 1: none.")
    max_length: int | None = Field(None, gt=0, description="Longest prompt plus answer, in tokens.")
    max_new_tokens: int | None = Field(512, gt=0, description="Longest answer, in tokens. Wins over max_length.")
    repetition_penalty: float = Field(1.0, gt=0, description="Above 1 discourages tokens that have already appeared.")
    length_penalty: float = Field(1.0, description="Beam search: above 0 favours longer answers.")

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


class RunConfig(Arguments):
    """All sections of one run."""

    model: ModelArguments
    data: DataArguments
    finetuning: FinetuningArguments
    training: TrainingArguments
    generating: GeneratingArguments

    @property
    def compute_dtype(self) -> str:
        """``auto``, ``bf16``, ``fp16`` or ``fp32``, whichever of the three keys said it."""
        if self.training.bf16:
            return "bf16"
        return "fp16" if self.training.fp16 else self.model.compute_dtype

    def to_flat(self) -> dict[str, Any]:
        """Every key of every section in one flat mapping of plain values, as a YAML file holds them."""
        flat: dict[str, Any] = {}
        for name in type(self).model_fields:
            flat.update(getattr(self, name).model_dump(mode="json"))
        return flat


SECTIONS: dict[str, type[Arguments]] = {
    "model": ModelArguments,
    "data": DataArguments,
    "finetuning": FinetuningArguments,
    "training": TrainingArguments,
    "generating": GeneratingArguments,
}
"""Section name -> class, in the order in which ``tunesmith config`` prints them."""

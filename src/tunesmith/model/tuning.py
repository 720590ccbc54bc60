"""Makes a model trainable in the way that is asked for: all weights, some layers, LoRA, or any other method of PEFT."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from peft.config import PromptLearningConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import PreTrainedModel

from tunesmith.config.arguments import FinetuningArguments
from tunesmith.errors import ConfigError
from tunesmith.model.adapter import Factors, load_adapter_weights, own_factors, set_beneath
from tunesmith.model.lineage import NOTHING, Line, continued_config, joins, merge, stay
from tunesmith.model.origin import Origin, set_origin
from tunesmith.model.quantize import is_quantised
from tunesmith.model.targets import check_modules, expert_parameters, resolve_targets, trainable_in_layers

Rows = Mapping[str, list[int]]
"""Name of a layer -> ids of tokens."""

_SET_HERE = frozenset(
    {"task_type", "peft_type", "inference_mode", "base_model_name_or_path", "auto_mapping", "modules_to_save"}
)
_STARTS = ("gaussian", "orthogonal")
"""What ``init_lora_weights`` can be, beside true and false, so that the adapter fits the base as it is."""
_NOT_TAKEN = {
    "adalora": "spreads its ranks after every update and adds a loss of its own",
    "shadow": "adds a loss of its own",
}
"""Methods -> what of them training here does not do."""
_OPTIONS_NOT_TAKEN = {
    "alora_invocation_tokens": "begins within each row, which is not seen where rows are laid end to end",
    "monteclora_config": "adds a loss of its own, which is not done here",
    "layer_replication": "makes more layers than the model's settings tell of",
    "use_asa": "chooses weights after every update",
}
"""Options of methods, in the same way."""


def init_adapter(
    model: PreTrainedModel,
    args: FinetuningArguments,
    base_name: str,
    line: Line = NOTHING,
    rows: Rows | None = None,
) -> torch.nn.Module:
    """Make the model trainable as ``finetuning_type`` says, going on from what was trained before.

    Trainable weights are float32, whatever the base computes in.

    Args:
        model: the base.
        args: what is trained.
        base_name: noted in the adapter's configuration as the model it belongs to.
        line: what was trained before; a whole model among it was loaded as the base.
        rows: name of a layer -> ids of tokens whose rows are learned with the adapter (``vocabulary.trainable_rows``).

    Raises:
        ConfigError: a layer, module or option that does not exist; or nothing is to be trained.
        ModelError: what was trained before does not fit the model.
    """
    line.put_weights(model)
    match args.finetuning_type:
        case "none":
            raise ConfigError("finetuning_type: none trains nothing; choose lora, freeze, full or peft to train")
        case "lora" | "peft":
            return _with_adapters(model, args, base_name, line, dict(rows or {}))
    if line.adapters:
        raise ConfigError(
            f"checkpoint_dir: {line.adapters[0]} is an adapter, and finetuning_type: {args.finetuning_type} trains the model's "
            "own weights; export the adapter, and give the export as model_name_or_path"
        )
    if args.finetuning_type == "full":
        model.float().requires_grad_(True)
        return model
    set_origin(model, line.origins()[0], Origin())
    return _thaw(model, args)


def _with_adapters(model: PreTrainedModel, args: FinetuningArguments, base_name: str, line: Line, rows: Rows) -> PeftModel:
    goes_on = line.adapters[-1] if line.adapters and line.resume else None
    earlier = line.earlier_adapters
    model.requires_grad_(False)
    beneath: list[Factors] = []
    stays = is_quantised(model)
    for folder in () if stays else earlier:
        model, factors = merge(model, folder)
        beneath.append(factors)
    if goes_on is not None:
        config = continued_config(goes_on, args)
        _check_taken(str(PeftType(config.peft_type).value).lower(), vars(config))
        _compare_rows(config, rows, goes_on)
    else:
        config = lora_config(model, args) if args.finetuning_type == "lora" else _other_config(model, args)
        _take_rows(config, rows, args)
    if (beneath or (stays and earlier)) and not (isinstance(config, LoraConfig) and joins(config)):
        raise ConfigError("checkpoint_dir: on top of an adapter only plain LoRA can be trained; export the adapter first")
    tuned = adapted(model, config, base_name)
    if stays:
        beneath += [stay(tuned, f"beneath{number}", folder) for number, folder in enumerate(earlier)]
    if goes_on is not None:
        load_adapter_weights(tuned, goes_on)
    elif args.pissa_init:
        beneath.append({name: (down, -up) for name, (down, up) in own_factors(tuned).items()})
    set_beneath(tuned, beneath)
    set_origin(tuned, *line.origins())
    return tuned


def _check_taken(method: str, options: Mapping[str, Any]) -> None:
    """Raise ConfigError for what would be trained otherwise than its name says."""
    if reason := _NOT_TAKEN.get(method):
        raise ConfigError(f"peft_method: {method} {reason}, which is not done here; choose another method")
    for name, reason in _OPTIONS_NOT_TAKEN.items():
        if options.get(name) not in (None, False):
            raise ConfigError(f"peft_args: {name}: {method} with it {reason}; remove it")


def _take_rows(config: PeftConfig, rows: Rows, args: FinetuningArguments) -> None:
    if not rows:
        return
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"add_tokens: peft_method: {args.peft_method} cannot learn rows of tokens; use finetuning_type: lora")
    if args.pissa_init:
        raise ConfigError("add_tokens: rows of tokens cannot be saved with what pissa_init begins; unset one of the two")
    config.trainable_token_indices = dict(rows)


def _compare_rows(config: PeftConfig, rows: Rows, folder: Path) -> None:
    learned = (config.trainable_token_indices or {}) if isinstance(config, LoraConfig) else {}
    if learned != rows:
        raise ConfigError(
            f"add_tokens: the adapter in {folder} has rows for {_count(learned)} added tokens, the settings add "
            f"{_count(rows)}; give add_tokens and add_special_tokens as its run had them"
        )


def _count(rows: Rows) -> int:
    return len(next(iter(rows.values()), []))


def adapted(model: PreTrainedModel, config: PeftConfig, base_name: str) -> PeftModel:
    """The model with a new trainable adapter. Raises ConfigError when PEFT refuses."""
    config.base_model_name_or_path = None  # it would warn of another name
    try:
        tuned = get_peft_model(model, config, autocast_adapter_dtype=True)
    except (ValueError, TypeError, LookupError, RuntimeError, ImportError) as error:  # each method of PEFT raises its own
        raise ConfigError(f"the adapter cannot be made: {str(error).splitlines()[0]}") from error
    tuned.active_peft_config.base_model_name_or_path = base_name
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return tuned


def _thaw(model: PreTrainedModel, args: FinetuningArguments) -> PreTrainedModel:
    names = trainable_in_layers(model, args.num_layer_trainable, args.name_module_trainable, args.freeze_extra_modules)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
        if name in names:
            parameter.data = parameter.data.float()
    return model


def lora_config(model: PreTrainedModel, args: FinetuningArguments) -> LoraConfig:
    """PEFT's configuration of the LoRA adapter that is asked for. Raises ConfigError for layers that do not exist."""
    experts = expert_parameters(model) if args.lora_target == ("all",) else []
    for key in ("lora_dropout", "use_dora", "pissa_init"):
        if experts and getattr(args, key):
            raise ConfigError(f"{key}: the weights of experts cannot be adapted so; unset it, or name layers in lora_target")
    targets = resolve_targets(model, args.lora_target)
    initial: Any = True
    if args.pissa_init:
        _check_pissa(model, args, targets)
        initial = "pissa" if args.pissa_iter < 0 else f"pissa_niter_{args.pissa_iter}"
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=args.lora_rank,
        lora_alpha=args.lora_alpha if args.lora_alpha is not None else 2 * args.lora_rank,
        lora_dropout=args.lora_dropout,
        target_modules=targets,
        target_parameters=experts or None,
        modules_to_save=check_modules(model, args.additional_target, "additional_target") or None,
        use_rslora=args.use_rslora,
        use_dora=args.use_dora,
        init_lora_weights=initial,
    )


def _check_pissa(model: PreTrainedModel, args: FinetuningArguments, targets: list[str] | str) -> None:
    """Raise ConfigError where the result could not be saved as a plain adapter of the base as it is."""
    if args.additional_target:
        raise ConfigError(
            "pissa_init: what it begins is saved as low-rank products alone, without the modules of additional_target; unset "
            "one of the two"
        )
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for name, module in model.named_modules():
        shared = module is head and head.weight is embedding.weight
        if (isinstance(module, torch.nn.Embedding) or shared) and _is_target(name, targets):
            raise ConfigError(
                f"pissa_init: cannot begin an adapter of {name}, an embedding or a head that is one; leave it out"
            )


def _is_target(name: str, targets: list[str] | str) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _other_config(model: PreTrainedModel, args: FinetuningArguments) -> PeftConfig:
    """Configuration of the method that ``peft_method`` names, with ``peft_args`` as its options."""
    methods = {str(kind.value).lower(): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    assert args.peft_method is not None
    cls = methods.get(args.peft_method.lower())
    usable = sorted(name for name, c in methods.items() if not issubclass(c, PromptLearningConfig) and name not in _NOT_TAKEN)
    if cls is None:
        close = difflib.get_close_matches(args.peft_method.lower(), usable, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"PEFT has {', '.join(usable)}"
        raise ConfigError(f"peft_method: no method {args.peft_method!r}; {hint}")
    _check_taken(args.peft_method.lower(), args.peft_args)
    if args.peft_method.lower() not in usable:
        raise ConfigError(
            f"peft_method: {args.peft_method} puts virtual tokens before every row, which rows laid end to end have no room "
            f"for; choose one of {', '.join(usable)}"
        )
    fields = {field.name for field in dataclasses.fields(cls)}
    for name in args.peft_args:
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"peft_args: {args.peft_method} has no option {name!r}{hint}")
    if own := sorted(_SET_HERE.intersection(args.peft_args)):
        raise ConfigError(f"peft_args: {', '.join(own)}: follows from the other settings; remove it")
    start = args.peft_args.get("init_lora_weights")
    if isinstance(start, str) and start not in _STARTS:
        raise ConfigError(
            f"peft_args: init_lora_weights: {start} needs steps that are not taken here, or changes the base; give one of "
            f"{', '.join(_STARTS)}, or set finetuning_type: lora and pissa_init: true"
        )
    values = {"target_modules": resolve_targets(model, args.lora_target), **args.peft_args}
    modules = check_modules(model, args.additional_target, "additional_target")
    try:
        return cls(**_only(cls, task_type="CAUSAL_LM", **({"modules_to_save": modules} if modules else {}), **values))
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"peft_args: {args.peft_method}: {str(error).splitlines()[0]}") from error


def _only(cls: type[PeftConfig], **values: Any) -> dict[str, Any]:
    fields = {field.name for field in dataclasses.fields(cls)}
    return {name: value for name, value in values.items() if name in fields}

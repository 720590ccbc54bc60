"""What a run goes on from: earlier adapters, trained weights, whole models; and how the result still fits the first base.

Rules. Entries of ``checkpoint_dir`` are applied in order. A whole model (only the first entry can be one) takes the place
of ``model_name_or_path``. Weights that a ``freeze`` run trained are put into the base. Of adapters, with
``resume_lora_training`` the last one is trained on; all others are merged into the base, or, where the base is quantised and
merging would round, stay in place, frozen, beside the one that is trained. Without it all are merged (or stay), and a new one
is trained. The finished adapter is that of the whole line: low-rank products are added by putting their factors side by side,
which is exact, so it fits the first base, in plain PEFT too.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from tunesmith.config.arguments import FinetuningArguments, ModelArguments
from tunesmith.errors import ConfigError, ModelError
from tunesmith.model.adapter import (
    TRAINABLE_WEIGHTS,
    Factors,
    load_adapter_weights,
    load_trainable_params,
    own_factors,
    save_trainable,
)
from tunesmith.model.files import ADAPTER_CONFIG, CLASSIFIER_HEAD, check_adapter_folder
from tunesmith.model.into_base import merge_into_base
from tunesmith.model.origin import ORIGIN, Origin, check_order, fingerprint, part, read_origin

_CLASSIFIERS = ("classifier", "score")
"""Modules that PEFT saves with the adapter of a sequence classifier."""
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
"""Ways of PEFT to begin an adapter that take something out of the base's weights."""
_GIVEN = ("lora_rank", "lora_alpha", "lora_target", "use_rslora", "use_dora", "additional_target", "pissa_init")


@dataclass(frozen=True)
class Ancestor:
    """Something that was trained before.

    Attributes:
        path: its folder.
        kind: an adapter, weights of some layers, or a whole model.
    """

    path: Path
    kind: Literal["adapter", "weights", "model"]


@dataclass(frozen=True)
class Line:
    """All that was trained before.

    Attributes:
        ancestors: in order.
        resume: whether the last adapter is trained on, or a new one on top of it.
    """

    ancestors: tuple[Ancestor, ...] = ()
    resume: bool = True

    @property
    def adapters(self) -> list[Path]:
        """Folders of the adapters."""
        return [ancestor.path for ancestor in self.ancestors if ancestor.kind == "adapter"]

    def on(self, args: ModelArguments) -> ModelArguments:
        """The arguments by which the base is loaded: a whole model of the line takes the place of the one named."""
        if not self.ancestors or self.ancestors[0].kind != "model":
            return args
        other = {
            "model_name_or_path": str(self.ancestors[0].path),
            "trust_remote_code": False,
        }  # not of this one
        return args.model_copy(update=other)

    def put_weights(self, model: PreTrainedModel) -> None:
        """Put the weights that freeze runs trained into the base. Raises ModelError when they do not fit."""
        for folder in self.weights:
            load_trainable_params(model, folder)

    @property
    def weights(self) -> list[Path]:
        """Folders of the weights that freeze runs trained."""
        return [ancestor.path for ancestor in self.ancestors if ancestor.kind == "weights"]

    @property
    def earlier_adapters(self) -> list[Path]:
        """Folders of the adapters beneath the one that is trained."""
        return self.adapters[:-1] if self.resume else self.adapters

    def origins(self) -> tuple[Origin, Origin]:
        """What the trained weights lie on: in checkpoints, and in the finished run, where adapters are joined."""
        needs = tuple(part(folder) for folder in self.weights)
        beneath = tuple(part(folder) for folder in self.earlier_adapters)
        above = self.adapters[len(beneath) :]
        same = tuple(one for folder in above for one in (part(folder), *read_origin(folder).contains))
        inner = tuple(one for folder in self.earlier_adapters for one in read_origin(folder).contains)
        return Origin((*needs, *beneath), same), Origin(needs, (*inner, *beneath, *same))

    def fingerprints(self) -> list[str]:
        """SHA-256 of each."""
        return [fingerprint(ancestor.path) for ancestor in self.ancestors]


NOTHING = Line()


def line_of(args: ModelArguments) -> Line:
    """What ``checkpoint_dir`` names.

    Raises:
        ModelError: a folder that is none of the three kinds, a whole model that is not first, or weights that were trained on
            top of others without these before them.
    """
    found: list[Ancestor] = []
    for number, name in enumerate(args.checkpoint_dir):
        folder = Path(name)
        if not folder.is_dir():
            raise ModelError(f"checkpoint_dir: no such folder: {name}")
        if (folder / ADAPTER_CONFIG).is_file():
            found.append(Ancestor(folder, "adapter"))
        elif (folder / TRAINABLE_WEIGHTS).is_file():
            found.append(Ancestor(folder, "weights"))
        elif (folder / "config.json").is_file():
            if number:
                raise ModelError(f"checkpoint_dir: {name} is a whole model; it can only be the first entry")
            found.append(Ancestor(folder, "model"))
        else:
            raise ModelError(
                f"checkpoint_dir: {name} holds neither {ADAPTER_CONFIG}, nor {TRAINABLE_WEIGHTS}, nor a model; name a finished "
                "run or one of its checkpoints"
            )
    if len(found) > 1 or any((one.path / ORIGIN).is_file() for one in found):
        check_order([one.path for one in found if one.kind != "model"])
    return Line(tuple(found), args.resume_lora_training)


def without_contained(args: ModelArguments, run: Path) -> ModelArguments:
    """The arguments of a finished run without adapters that are gone by now: its own adapter is that of the whole line."""
    contained = {Path(part.folder) for part in read_origin(run).contains}
    kept = tuple(name for name in args.checkpoint_dir if Path(name).is_dir() or Path(name) not in contained)
    return args.model_copy(update={"checkpoint_dir": kept})


def read_adapter_config(folder: Path) -> PeftConfig:
    """The configuration of an adapter. Raises ModelError when it cannot be read, or its weights are not safetensors."""
    check_adapter_folder(folder)
    try:
        config: PeftConfig = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{folder / ADAPTER_CONFIG}: cannot be read: {str(error).splitlines()[0]}") from error
    start = getattr(config, "init_lora_weights", True)
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        raise ModelError(
            f"{folder / ADAPTER_CONFIG}: init_lora_weights: {start} means that the adapter fits only what it left of the base "
            "when it began; name the finished run of pissa_init, which fits the base as it is, or export it, and give the "
            "export as model_name_or_path"
        )
    return config


def continued_config(folder: Path, args: FinetuningArguments) -> PeftConfig:
    """The configuration of the adapter that is trained on.

    Raises:
        ConfigError: the settings ask for another shape than it has.
    """
    config = read_adapter_config(folder)
    kind = str(getattr(config.peft_type, "value", config.peft_type)).lower()
    asked = "lora" if args.finetuning_type == "lora" else str(args.peft_method).lower()
    if kind != asked:
        settings = "finetuning_type: lora" if kind == "lora" else f"finetuning_type: peft with peft_method: {kind}"
        raise ConfigError(
            f"checkpoint_dir: the adapter in {folder} is of the method {kind}, and the settings ask for {asked}; set "
            f"{settings} to train it on"
        )
    if other := [name for name, value in args.peft_args.items() if _as_list(getattr(config, name, None)) != _as_list(value)]:
        raise ConfigError(
            f"peft_args: the adapter in {folder} is trained on as it is, with other {', '.join(other)}; remove the options"
        )
    config.inference_mode = False
    given = [key for key in _GIVEN if key in args.model_fields_set]
    if isinstance(config, LoraConfig):
        alpha = args.lora_alpha if args.lora_alpha is not None else 2 * args.lora_rank
        same = {"lora_rank": config.r == args.lora_rank, "lora_alpha": config.lora_alpha == alpha,
                "use_rslora": config.use_rslora == args.use_rslora, "use_dora": config.use_dora == args.use_dora}  # fmt: skip
        config.lora_dropout = args.lora_dropout
        config.init_lora_weights = True
        given = [key for key in given if not same.get(key, key == "lora_target")]
    if given:
        raise ConfigError(
            f"{', '.join(given)}: the adapter in {folder} is trained on as it is (resume_lora_training); remove the keys, or "
            "set resume_lora_training: false to train a new one on top"
        )
    return config


def _as_list(value: object) -> object:
    return sorted(value) if isinstance(value, set | list | tuple) else value


def merge(model: PreTrainedModel, folder: Path) -> tuple[PreTrainedModel, Factors]:
    """The base with an adapter merged into it, and the adapter's factors. Raises ModelError when it does not fit."""
    tuned = with_adapter(model, folder)
    factors = factors_of(tuned, "default", folder)
    return merge_into_base(tuned, folder, "export it, and give the export as model_name_or_path"), factors


def with_adapter(model: PreTrainedModel, folder: Path, name: str = "default", head: bool = False) -> PeftModel:
    """A model with one finished adapter on it.

    Args:
        model: the base.
        folder: of the adapter.
        name: of the adapter in the model.
        head: whether it may be that of a sequence classifier, whose head is left out.

    Raises:
        ModelError: it does not fit.
    """
    config = _finished_config(folder, head)
    try:
        tuned = PeftModel(model, config, adapter_name=name)
    except (ValueError, TypeError) as error:
        raise ModelError(f"{folder}: the adapter does not fit the model: {str(error).splitlines()[0]}") from error
    load_adapter_weights(tuned, folder, name, CLASSIFIER_HEAD if head else None)
    return tuned


def _finished_config(folder: Path, head: bool) -> PeftConfig:
    config = read_adapter_config(folder)
    config.inference_mode = True
    if isinstance(config, LoraConfig):
        config.init_lora_weights = True
        if head and config.task_type == "SEQ_CLS":
            kept = [module for module in config.modules_to_save or () if module not in _CLASSIFIERS]
            config.modules_to_save = kept or None
    return config


def stay(tuned: PeftModel, name: str, folder: Path) -> Factors:
    """Put an earlier adapter beside the trained one, active and frozen; returns its factors.

    Raises:
        ModelError: it does not fit.
    """
    put_beside(tuned, name, folder)
    earlier = [key for key in tuned.peft_config if key != "default"]
    tuned.base_model.set_adapter([*earlier, "default"])  # makes all of them trainable
    for key, parameter in tuned.named_parameters():
        if any(f".{one}." in key for one in earlier):
            parameter.requires_grad_(False)
    return factors_of(tuned, name, folder)


def put_beside(tuned: PeftModel, name: str, folder: Path, head: bool = False) -> None:
    """Put a finished adapter, frozen and in float32, into a model that has others; those that are active stay so.

    Args:
        tuned: has other adapters.
        name: of the new one in the model.
        folder: of the new one.
        head: as ``with_adapter``.

    Raises:
        ModelError: it does not fit the model, or is of another method than the others.
    """
    config = _finished_config(folder, head)
    learning = {id(parameter) for parameter in tuned.parameters() if parameter.requires_grad}
    try:
        tuned.add_adapter(name, config)
    except (ValueError, TypeError) as error:
        raise ModelError(f"{folder}: the adapter does not fit beside the others: {str(error).splitlines()[0]}") from error
    load_adapter_weights(tuned, folder, name, CLASSIFIER_HEAD if head else None)
    for key, parameter in tuned.named_parameters():
        parameter.requires_grad_(id(parameter) in learning)
        if f".{name}." in key:
            parameter.data = parameter.data.float()


def copy_beside(tuned: PeftModel, name: str) -> None:
    """Put a frozen copy of the adapter that is trained, as it is now, beside it. Raises ModelError as ``put_beside``."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_trainable(tuned, folder)
        settings = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        if "init_lora_weights" in settings:  # how it began is no matter any more
            settings["init_lora_weights"] = True
            (folder / ADAPTER_CONFIG).write_text(json.dumps(settings), encoding="utf-8")
        put_beside(tuned, name, folder)


def joins(config: LoraConfig) -> bool:
    """Whether an adapter is nothing but low-rank products, so that it can be joined with others."""
    more = (config.use_dora, config.modules_to_save, config.target_parameters, config.trainable_token_indices)
    return not any(more)


def factors_of(tuned: PeftModel, adapter: str, folder: Path) -> Factors:
    """The low-rank factors of an adapter, scaled, by layer.

    Raises:
        ModelError: the adapter is more than low-rank products, so that it cannot be joined with others.
    """
    config = tuned.peft_config[adapter]
    plain = isinstance(config, LoraConfig) and joins(config)
    embeddings = any(isinstance(m, LoraLayer) and adapter in m.lora_embedding_A for m in tuned.modules())
    factors = own_factors(tuned, adapter)
    if not plain or embeddings or not factors:
        raise ModelError(
            f"{folder}: an adapter of this kind (not plain LoRA on linear layers) cannot be joined with another; export it, "
            "and give the export as model_name_or_path"
        )
    return factors

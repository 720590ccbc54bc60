"""How many bytes the tensors of a run hold at most: one update of the run's own trainer, on a model without weights.

Nothing is loaded and nothing computed (``model/phantom.py``). Layers that are alike are not all run: what two models of few
layers need is a straight line in their number, in each part of the update, and is followed to the number that the model has.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from tunesmith.config.arguments import RunConfig
from tunesmith.config.policy import POLICY_STAGES
from tunesmith.data.heaviest import blank_batch
from tunesmith.data.learned import Learned
from tunesmith.data.memory import RowsInMemory
from tunesmith.data.prepare import TARGETS
from tunesmith.errors import ConfigError, ModelError
from tunesmith.model import attention
from tunesmith.model.adapter import head_of, recompute_activations, set_head, trainable_parameters
from tunesmith.model.attention import NotSegmentable
from tunesmith.model.forward import FlatForward, other_layers
from tunesmith.model.fuse import fuse
from tunesmith.model.heads import ValueHead, head_width
from tunesmith.model.lineage import continued_config, line_of
from tunesmith.model.lora_kernel import install_lora_kernel
from tunesmith.model.output import Output, adds_nothing
from tunesmith.model.phantom import LiveBytes, make_fake, round_layers
from tunesmith.model.precision import norms_to_float, resolve_dtype
from tunesmith.model.settings import read_settings
from tunesmith.model.source import locate
from tunesmith.model.targets import decoder_layers
from tunesmith.model.tuning import adapted, init_adapter
from tunesmith.sampled import ends_only
from tunesmith.stages.policy import PolicyIngredients
from tunesmith.train.optim.averaged import use_training_point
from tunesmith.train.progress import SilentReporter
from tunesmith.train.step import ComputeLoss
from tunesmith.train.trainer import Ingredients, PeftTrainer
from tunesmith.types import Batch, LossOutput, Source

KINDS = ("weights", "gradients", "optimizer", "activations", "head", "other")
"""What bytes are counted as. head: logits, their loss and its gradient; other: what lives within an operation or a layer's
backward pass only."""


_SMALL = 8
"""Tokens of the batch on which the first update is made."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of tensors at the moment of an update when they are most.

    Attributes:
        kinds: of ``KINDS`` -> bytes.
        optimizer: bytes of the optimizer's state.
    """

    kinds: dict[str, int]
    optimizer: int

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(self.kinds.values())


def footprint(config: RunConfig, trainer: type[PeftTrainer], batch: Batch, device: torch.device) -> Footprint:
    """What an update on ``batch`` needs.

    Args:
        config: of the run.
        trainer: of its stage.
        batch: the micro-batch that needs most.
        device: where the run would be.

    Raises:
        ModelError: the model cannot be run without weights.
        ConfigError: settings that do not suit the model.
    """
    try:
        try:
            return _followed(config, trainer, batch, device, True)
        except NotSegmentable:
            return _followed(config, trainer, batch, device, False)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, AssertionError) as error:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        raise ModelError(f"what an update needs cannot be found by running the model without weights: {reason}") from error


def _followed(config: RunConfig, trainer: type[PeftTrainer], batch: Batch, device: torch.device, flat: bool) -> Footprint:
    """What an update needs, from all layers or from a few."""
    model, flat = _skeleton(config, device, flat)
    counts = _layers_to_run(config, model)
    if counts is None:
        return _of(_run(config, trainer, batch, device, model, flat))
    total = len(decoder_layers(model)[1])
    few, more = (_run(config, trainer, batch, device, _skeleton(config, device, flat, count)[0], flat) for count in counts)
    state = _line({"": few.state}, {"": more.state}, counts, total)[""]
    return _of(_Peaks(_line(few.phases, more.phases, counts, total), state))


@dataclass(frozen=True)
class _Peaks:
    """Phase of an update -> bytes by kind at its peak; bytes of the optimizer's state."""

    phases: dict[str, Counter[str]]
    state: Counter[str]


def _of(peaks: _Peaks) -> Footprint:
    highest = max(peaks.phases.values(), key=lambda kinds: kinds.total())
    return Footprint({kind: highest[kind] for kind in KINDS}, peaks.state.total())


def _line(
    few: dict[str, Counter[str]], more: dict[str, Counter[str]], counts: tuple[int, int], total: int
) -> dict[str, Counter[str]]:
    a, b = counts
    return {
        phase: Counter(
            {kind: few[phase][kind] + (more[phase][kind] - few[phase][kind]) * (total - a) // (b - a) for kind in KINDS}
        )
        for phase in few
    }


# ---- the model


def _skeleton(config: RunConfig, device: torch.device, flat: bool, layers: int | None = None) -> tuple[PreTrainedModel, bool]:
    """The base on the meta device, all of its layers or the first few; and whether rows run end to end, if ``flat``."""
    attention.register()
    args, dtype = line_of(config.model).on(config.model), resolve_dtype(config.compute_dtype, device)
    source = locate(args)
    settings = read_settings(source.path, source.trusted)
    asked = None if args.attn_implementation == "auto" else args.attn_implementation
    full = config.finetuning.finetuning_type == "full"
    flat = flat and asked is None and args.quantization_bit != 8 and not other_layers(settings.get_text_config())
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(
            settings, dtype=torch.float32 if full else dtype, attn_implementation=attention.SEGMENTS if flat else asked,
            trust_remote_code=source.trusted,
        )  # fmt: skip
    model.tie_weights()
    if layers is not None:
        name, stack = decoder_layers(model)
        model.get_submodule(name.rpartition(".")[0]).register_module(name.rpartition(".")[2], stack[:layers])
        model.config.get_text_config().num_hidden_layers = layers
    if args.quantization_bit is not None:
        round_layers(model, args.quantization_bit, model.get_output_embeddings())
    if args.upcast_layernorm or (args.upcast_layernorm is None and args.quantization_bit is not None):
        norms_to_float(model, args.layer_norm_names)
    return model, flat


def _layers_to_run(config: RunConfig, model: PreTrainedModel) -> tuple[int, int] | None:
    """How many layers the two small models have; None if all of them must be run."""
    try:
        _, stack = decoder_layers(model)
    except ConfigError:
        return None
    tuning = config.finetuning
    shapes = {tuple((name, tuple(p.shape), p.dtype) for name, p in layer.named_parameters()) for layer in stack}
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    named = [name for names in (tuning.lora_target, tuning.additional_target, tuning.freeze_extra_modules) for name in names]
    if len(shapes) > 1 or len(kinds) > 1 or any(letter.isdigit() for name in named for letter in name):
        return None
    first = abs(tuning.num_layer_trainable) + 1 if tuning.finetuning_type == "freeze" else 2
    return (first, first + 1) if first + 1 < len(stack) else None


def _tuned(config: RunConfig, model: PreTrainedModel) -> torch.nn.Module:
    """The base made trainable; what was trained before has a shape only."""
    tuning, line = config.finetuning, line_of(config.model)
    if line.adapters and line.resume:
        model.requires_grad_(False)
        tuned: torch.nn.Module = adapted(model, continued_config(line.adapters[-1], tuning), "")
    else:
        tuned = init_adapter(model, tuning.model_copy(update={"pissa_init": False}), "")
    if config.training.gradient_checkpointing is True:
        recompute_activations(tuned)
    if config.finetuning.stage in ("rm", "ppo"):
        set_head(tuned, ValueHead(head_width(model)))
    return tuned


# ---- the update


def _run(
    config: RunConfig, kind: type[PeftTrainer], batch: Batch, device: torch.device, base: PreTrainedModel, flat: bool
) -> _Peaks:
    with torch.device("meta"):
        model = _tuned(config, base)
    fuse(model)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    seeds = torch.random.fork_rng(devices=[])  # attention dropout draws one on the host
    with seeds, LiveBytes(fake) as live, ends_only():
        live.kind = "weights"
        make_fake(model, live, device)
        if (head := head_of(model)) is not None:
            make_fake(head, live, device)
        trainer = kind(config.training, _ingredients(config, model, flat, device))
        trainer.updater.scaler = None  # its few numbers do not matter, and what it reads of the gradients would be made up
        for parameter in trainable_parameters(model).values():
            parameter.register_post_accumulate_grad_hook(lambda p: live.recount(p.grad, "gradients"))
        _mark(live, base, trainer)
        use_training_point(trainer.optimizer)
        model.train()
        rows = TARGETS[config.finetuning.stage]
        loss, small = _in_phases(live, trainer), blank_batch((_SMALL, _SMALL), 2 * _SMALL - 2, rows).to(device)
        trainer.updater.update([small], loss, 1)  # makes the optimizer's state
        state = Counter({"optimizer": live.live["optimizer"]})
        live.peaks.clear()
        window = [small, batch.to(device)] if config.training.gradient_accumulation_steps > 1 else [batch.to(device)]
        trainer.updater.update(window, loss, 2)
    return _Peaks(live.peaks, state)


def _ingredients(config: RunConfig, model: torch.nn.Module, flat: bool, device: torch.device) -> Ingredients:
    row = Learned(np.zeros(2, np.int32), ((0, 2, 1.0),), Source("", "", 0, 0))
    shares, dtype = flat and config.finetuning.share_prompts, resolve_dtype(config.compute_dtype, device)
    forward = FlatForward(model, flat, config.training.neftune_noise_alpha, shares)
    install_lora_kernel(forward, dtype)
    given = Ingredients(
        forward=forward,
        tokenizer=None,  # nothing is saved
        train_examples=RowsInMemory([row]),
        eval_examples=None,
        device=device,
        compute_dtype=dtype,
        run=Path(config.training.output_dir),
        reporter=SilentReporter(),
        finetuning=config.finetuning,
        attention="",
        output=Output() if adds_nothing(model) else None,
    )
    if config.finetuning.stage not in POLICY_STAGES:
        return given
    return PolicyIngredients(**vars(given), policy=config.policy, generating=config.generating)


def _in_phases(live: LiveBytes, trainer: PeftTrainer) -> ComputeLoss:
    """The trainer's loss; its forward pass is a phase, and what follows another."""

    def compute(batch: Batch) -> LossOutput:
        live.phase, live.kind = "forward", "activations"
        loss = trainer.compute_loss(batch)
        live.phase, live.kind = "backward of the head", "head"
        return loss

    return compute


def _mark(live: LiveBytes, base: PreTrainedModel, trainer: PeftTrainer) -> None:
    """Have the phases begin where they do: peaks within each of them are straight lines in the number of layers."""

    def begin(phase: str) -> None:
        live.phase, live.kind = phase, "other"

    def before_update(*_: Any) -> None:
        live.phase, live.kind = "update", "other" if trainer.optimizer.state else "optimizer"

    trainer.optimizer.register_step_pre_hook(before_update)
    try:
        last = decoder_layers(base)[1][-1]
    except ConfigError:
        return

    def enters(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if live.phase == "forward" and isinstance(hidden, torch.Tensor) and hidden.requires_grad:
            hidden.register_hook(lambda _: begin("backward of the other layers"))

    def leaves(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if live.phase == "forward":
            live.kind = "head"
            if hidden.requires_grad:
                hidden.register_hook(lambda _: begin("backward of the last layer"))

    last.register_forward_pre_hook(enters, with_kwargs=True)
    last.register_forward_hook(leaves)

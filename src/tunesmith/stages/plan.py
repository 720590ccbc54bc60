"""Whether a run fits in memory, told before a weight is loaded; and what to change where it does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from tunesmith.config.arguments import RunConfig
from tunesmith.config.policy import POLICY_STAGES, longest_answer
from tunesmith.data.heaviest import Cost, blank_batch, heaviest
from tunesmith.data.kinds import Rows
from tunesmith.data.loader import make_loader, planned_updates
from tunesmith.data.prepare import TARGETS, data_seed
from tunesmith.data.selection import Examples
from tunesmith.data.streaming import ExampleStream
from tunesmith.errors import ModelError, OutOfMemoryError
from tunesmith.model.lineage import line_of
from tunesmith.model.memory import GIB, allocator_slack, available_memory, resident_memory
from tunesmith.model.precision import pick_device
from tunesmith.model.settings import positions, read_settings
from tunesmith.model.source import locate
from tunesmith.stages.footprint import Footprint, footprint
from tunesmith.train.trainer import PeftTrainer
from tunesmith.types import Batch

ROOMY = 0.5
"""Share of the memory that an upper bound may take before it is looked at more closely."""
_TIGHT = 1.1
"""A plan is off by less than this factor (docs/performance.md); beyond it, a run is not begun."""


@dataclass(frozen=True)
class MemoryPlan:
    """What a run needs at the moment when it needs most. All in bytes.

    Attributes:
        tensors: by kind.
        process: what the process has before the model is loaded; 0 on a GPU.
        slack: of the allocator.
        available: what there is for all that, None where it cannot be told.
        device: where.
        batch: the micro-batch that needs most: rows, tokens, longest row.
        recomputes: whether activations are recomputed.
        changes: (what to set, bytes that would be needed then), where it does not fit.
    """

    tensors: Footprint
    process: int
    slack: int
    available: int | None
    device: torch.device
    batch: tuple[int, int, int]
    recomputes: bool
    changes: tuple[tuple[str, int], ...] = ()

    @property
    def peak(self) -> int:
        """Bytes of the whole run."""
        return self.process + self.tensors.total + self.slack

    @property
    def fits(self) -> bool:
        """Whether it does, as far as can be told."""
        return self.available is None or self.peak <= self.available

    @property
    def hopeless(self) -> bool:
        """Whether it would not fit even if the plan were as wrong as it can be."""
        return self.available is not None and self.peak > _TIGHT * self.available

    def to_dict(self) -> dict[str, Any]:
        """For ``tunesmith check --json``; all numbers are bytes."""
        rows, tokens, longest = self.batch
        return {
            "peak": self.peak,
            "available": self.available,
            "fits": self.fits,
            "gradient_checkpointing": self.recomputes,
            "device": str(self.device),
            **self.tensors.kinds,
            "optimizer_state": self.tensors.optimizer,
            "process": self.process,
            "allocator": self.slack,
            "batch": {"rows": rows, "tokens": tokens, "longest": longest},
            "changes": [{"set": change, "peak": peak} for change, peak in self.changes],
        }

    def line(self) -> str:
        """For a person, in one line."""
        parts = [f"{_gib(size)} {kind}" for kind, size in self.tensors.kinds.items() if size >= GIB // 100]
        parts += [f"{_gib(self.slack)} allocator", *([f"{_gib(self.process)} process"] if self.process else [])]
        there = "" if self.available is None else f" of {_gib(self.available)} GiB"
        rows, tokens, longest = self.batch
        return (
            f"memory: {_gib(self.peak)}{there or ' GiB'} on {self.device} ({', '.join(parts)}), at a batch of {rows} rows, "
            f"{tokens:,} tokens, the longest row {longest:,}{'; activations are recomputed' if self.recomputes else ''}"
        )

    def shortage(self) -> str:
        """How much is missing."""
        assert self.available is not None
        return f"the run would need {_gib(self.peak)} GiB of memory, and {_gib(self.available)} GiB are there."

    def advice(self) -> str:
        """What to change, with what would be needed then."""
        if not self.changes:
            return "Nothing that could be changed makes it fit: take a smaller model."
        return "It would need: " + "; ".join(f"{_gib(peak)} GiB with {change}" for change, peak in self.changes)


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}" if size < 10 * GIB else f"{size / GIB:.1f}"


@dataclass(frozen=True)
class Decision:
    """How a run begins.

    Attributes:
        recompute: whether activations are recomputed.
        rehearsed: the batch to try beforehand; None where there is no doubt.
        said: a sentence for the log, or nothing.
    """

    recompute: bool
    rehearsed: Batch | None
    said: str = ""


def decide(
    config: RunConfig, trainer: type[PeftTrainer], rows: Examples | Rows[Any] | ExampleStream, device: torch.device
) -> Decision:
    """Whether to recompute activations and to try the largest batch beforehand.

    Raises:
        OutOfMemoryError: it cannot fit, and ``check_memory`` is on.
    """
    asked = config.training.gradient_checkpointing
    batch, available = heaviest_batch(config, rows), _available(device)
    if available is None or upper_bound(config, batch) < ROOMY * available:
        return Decision(asked is True, None)
    try:
        plan = plan_run(config, trainer, batch, device)
    except ModelError as error:
        return Decision(asked is True, batch, f"memory: {error}")
    if plan.hopeless and config.training.check_memory:
        raise OutOfMemoryError(f"{plan.shortage()} {plan.advice()}. check_memory: false begins the run all the same.")
    return Decision(plan.recomputes, batch, plan.line())


def plan_run(config: RunConfig, trainer: type[PeftTrainer], batch: Batch, device: torch.device) -> MemoryPlan:
    """What a run needs, ``gradient_checkpointing: auto`` decided, and what to change where it does not fit.

    Args:
        config: of the run.
        trainer: of its stage.
        batch: the micro-batch that needs most.
        device: where it runs.

    Raises:
        ModelError: the model cannot be run without weights.
    """
    plan = plan_memory(config, trainer, batch, device)
    if not plan.fits and config.training.gradient_checkpointing == "auto":
        config = _with(config, gradient_checkpointing=True)
        plan = plan_memory(config, trainer, batch, device)
    return plan if plan.fits else _with_changes(config, trainer, plan, batch)


def plan_memory(config: RunConfig, trainer: type[PeftTrainer], batch: Batch, device: torch.device) -> MemoryPlan:
    """What a run needs.

    Args:
        config: of the run; ``gradient_checkpointing: auto`` counts as false.
        trainer: of its stage.
        batch: the micro-batch that needs most.
        device: where it runs.

    Raises:
        ModelError: the model cannot be run without weights.
    """
    available, process = _available(device), resident_memory() if device.type == "cpu" else 0
    tensors = footprint(config, trainer, batch, device)
    slack = allocator_slack(tensors.total - tensors.kinds["weights"], device)
    size = (len(batch.lengths), batch.num_tokens, max(batch.lengths))
    return MemoryPlan(tensors, process, slack, available, device, size, config.training.gradient_checkpointing is True)


def _with_changes(config: RunConfig, trainer: type[PeftTrainer], plan: MemoryPlan, batch: Batch) -> MemoryPlan:
    """The plan with settings that need less, each with what it would need."""
    found = []
    for name, changed, smaller in _alternatives(config, batch):
        try:
            found.append((name, plan_memory(changed, trainer, smaller, plan.device).peak))
        except ModelError:
            continue
    less = sorted((change for change in found if change[1] < plan.peak), key=lambda change: change[1])
    return replace(plan, changes=tuple(less))


def _alternatives(config: RunConfig, batch: Batch) -> Iterator[tuple[str, RunConfig, Batch]]:
    training, tuning, lengths = config.training, config.finetuning, batch.lengths
    kind, common = TARGETS[tuning.stage], 2 * batch.num_repeated / batch.num_tokens
    if training.gradient_checkpointing is not True:
        yield "gradient_checkpointing: true", _with(config, gradient_checkpointing=True), batch
    size = training.per_device_train_batch_size
    if size > 1:
        half = max(size // 2, 1)
        steps = training.gradient_accumulation_steps * size // half
        kept = sorted(lengths)[-max(len(lengths) * half // size, 1) :]
        changed = _with(config, per_device_train_batch_size=half, gradient_accumulation_steps=steps)
        fewer = blank_batch(kept, batch.num_targets * sum(kept) // sum(lengths), kind, common)
        yield f"per_device_train_batch_size: {half} and gradient_accumulation_steps: {steps}", changed, fewer
    if max(lengths) > 64:
        cut = max(lengths) // 2
        shorter = [min(length, cut) for length in lengths]
        targets = batch.num_targets * sum(shorter) // sum(lengths)
        yield f"cutoff_len: {cut}", config, blank_batch(shorter, targets, kind, common)
    if tuning.finetuning_type == "full":
        yield "finetuning_type: lora", config.model_copy(update={"finetuning": _as_lora(config)}), batch
    if tuning.finetuning_type == "lora" and config.model.quantization_bit is None:
        quantised = config.model.model_copy(update={"quantization_bit": 4})
        yield "quantization_bit: 4", config.model_copy(update={"model": quantised}), batch


def _with(config: RunConfig, **training: Any) -> RunConfig:
    return config.model_copy(update={"training": config.training.model_copy(update=training)})


def _as_lora(config: RunConfig) -> Any:
    return config.finetuning.model_copy(update={"finetuning_type": "lora"})


def _available(device: torch.device) -> int | None:
    """Bytes for the whole process."""
    free = available_memory(device)
    return free if free is None or device.type != "cpu" else free + resident_memory()


# ---- which batch, and how much it needs at most


def heaviest_batch(config: RunConfig, rows: Examples | Rows[Any] | ExampleStream) -> Batch:
    """The micro-batch of the run that needs most memory."""
    data = config.data
    if config.finetuning.stage in POLICY_STAGES:
        return _longest_answers(config, rows)
    capacity = data.cutoff_len if data.packing else None
    loader = make_loader(rows, config.training, data_seed(config), not data.disable_shuffling, capacity)
    text = _settings(config)
    cost = Cost(
        _token_bytes(text), 8.0 * text.hidden_size, config.model.attn_implementation != "auto", config.finetuning.share_prompts
    )
    if isinstance(rows, ExampleStream):
        refuse_impossible(config, data.cutoff_len)
    batch = heaviest(loader, planned_updates(loader, config.training), cost, data.cutoff_len)
    return replace(batch, reference_2P=torch.zeros(2, round(batch.total_weight))) if isinstance(rows, Rows) else batch


def _longest_answers(config: RunConfig, rows: Any) -> Batch:
    """Answers as long as they can be to the longest prompts; each to a prompt of its own, as if nothing were shared."""
    size = config.training.per_device_train_batch_size
    prompts = sorted(rows.lengths.tolist())[-size:]
    answers = [longest_answer(config.policy, config.generating, length) for length in prompts]
    most = positions(_settings(config))
    if most is not None:  # prompts that leave no room are refused when the model is there
        answers = [min(answer, max(most - prompt, 1)) for prompt, answer in zip(prompts, answers, strict=True)]
    lengths = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    return blank_batch(lengths, sum(answers), "prompt")


def refuse_impossible(config: RunConfig, longest: int) -> None:
    """Refuse a batch of a stream whose embeddings alone would not fit, before it is made up.

    Raises:
        OutOfMemoryError: so it is.
    """
    size, available = config.training.per_device_train_batch_size, _available(pick_device())
    needed = 4 * size * longest * _settings(config).hidden_size
    if available is not None and needed > available:
        raise OutOfMemoryError(
            f"per_device_train_batch_size: {size} rows of up to {longest:,} tokens need {_gib(needed)} GiB for their "
            f"embeddings alone, and {_gib(available)} GiB are there; take a smaller batch or cutoff_len"
        )


def _settings(config: RunConfig) -> PreTrainedConfig:
    source = locate(line_of(config.model).on(config.model))
    return read_settings(source.path, source.trusted).get_text_config()


def _token_bytes(text: PreTrainedConfig) -> float:
    """Activations of a token that are kept for the backward pass, roughly: float32, every intermediate result of a layer."""
    width, inner = text.hidden_size, getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    return 4.0 * text.num_hidden_layers * (24 * width + 6 * inner)


def upper_bound(config: RunConfig, batch: Batch) -> float:
    """Bytes that a run surely stays below: float32 throughout, every weight trained, padded rows, whole attention matrices."""
    text, rows, longest = _settings(config), len(batch.lengths), max(batch.lengths)
    heads = getattr(text, "num_attention_heads", 1)
    weights = sum(file.stat().st_size for file in _weight_files(config))
    matrices = 16.0 * rows * longest**2 * heads * text.num_hidden_layers if config.model.attn_implementation == "eager" else 0.0
    tokens = rows * longest
    return 1.5 * (10 * weights + tokens * (3 * _token_bytes(text) + 16 * text.vocab_size) + matrices) + 2 * GIB


def _weight_files(config: RunConfig) -> list[Path]:
    folder = locate(line_of(config.model).on(config.model)).path
    return [file for file in folder.iterdir() if file.suffix in (".safetensors", ".gguf")]

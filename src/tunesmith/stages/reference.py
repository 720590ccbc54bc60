"""Log-probabilities of answers under a reference model: computed once, before the first update, and kept on disk.

The reference is the model as training begins, earlier adapters and trained weights included, or another one that is named.
Either way no second model is in memory while training runs, and in a second epoch or a second run nothing is computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from tunesmith.config.arguments import ModelArguments, RunConfig
from tunesmith.config.paths import cache_root
from tunesmith.config.preferences import REFERENCE_FREE_LOSSES
from tunesmith.data.collator import collate
from tunesmith.data.kinds import Rows
from tunesmith.data.loader import DataLoader, make_loader, planned_updates, visited
from tunesmith.data.mismatched import MismatchedFeedback
from tunesmith.data.prepare import data_seed
from tunesmith.data.source import file_sha
from tunesmith.errors import DataError, ModelError, NonFiniteError
from tunesmith.model.files import ADAPTER_CONFIG, CONFIG
from tunesmith.model.forward import FlatForward
from tunesmith.model.lineage import Line
from tunesmith.model.load import load_base_model, prepare_flat, prepare_sharing
from tunesmith.model.memory import out_of_memory_explained
from tunesmith.model.output import find_output
from tunesmith.model.source import locate
from tunesmith.model.tokenizer import load_tokenizer
from tunesmith.stages.pairs import answer_logps
from tunesmith.stages.scores import batch_logprobs
from tunesmith.train.progress import Reporter
from tunesmith.train.trainer import Ingredients
from tunesmith.types import Batch, FeedbackExample, PairExample

_SAVED_EVERY = 64
"""Batches after which what has been computed is written."""


K = TypeVar("K", bound=PairExample | FeedbackExample)


class Referenced(Rows[K]):
    """Pairs or feedback with their reference log-probabilities.

    Args:
        rows: the pairs or the feedback.
        table: float32 ``[N, 2]``: of both answers of a pair, of the answer and the mismatched one of feedback; not a number
            where it was not asked for.
    """

    def __init__(self, rows: Rows[K], table: np.ndarray) -> None:
        assert table.shape == (len(rows), 2), (table.shape, len(rows))
        super().__init__(rows.selection, rows.kind)
        self.rows = rows
        self.table = table

    def item(self, index: int) -> K:
        """A row."""
        first, second = self.table[index].tolist()
        assert not math.isnan(first), f"row {index} has no reference"
        return replace(self.rows.item(index), reference=(first, second))


def referenced(config: RunConfig, given: Ingredients, line: Line) -> Ingredients:
    """The ingredients with rows that know what the reference says of them, where the losses of a run ask for it.

    Args:
        config: of the run, of a stage that learns pairs or feedback.
        given: the model as training begins.
        line: what it goes on from.

    Raises:
        ModelError: ``ref_model`` cannot be loaded.
        DataError, NonFiniteError: as ``with_reference``.
    """
    tuning, training = config.finetuning, config.training
    if tuning.stage == "dpo" and set(tuning.pref_loss) <= REFERENCE_FREE_LOSSES:
        return given
    train, held_out = (_mismatched(config, rows) for rows in (given.train_examples, given.eval_examples))
    assert isinstance(train, Rows)
    loader = make_loader(train, training, data_seed(config), given.shuffle, None)
    assert isinstance(loader, DataLoader)
    size = training.per_device_train_batch_size
    reference = Reference(cache(partial(reference_model, config, given)), _facts(config, given, line), tuning.ld_alpha, size)
    needed = visited(loader, planned_updates(loader, training))
    known = with_reference(train, needed, reference, given.reporter)
    if isinstance(held_out, Rows):
        held_out = with_reference(held_out, np.arange(len(held_out)), reference, given.reporter)
    return replace(given, train_examples=known, eval_examples=held_out)


def check_reference(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ModelError where ``ref_model`` is not there, or has other tokens than the tokenizer; no weight is read."""
    name = config.finetuning.ref_model
    if name is None:
        return
    args = _reference_args(config)
    try:
        locate(args, weights=False)
    except ModelError as error:
        raise ModelError(f"ref_model: {str(error).removeprefix('model_name_or_path: ')}") from error
    if load_tokenizer(args).get_vocab() != tokenizer.get_vocab():
        own = config.model.model_name_or_path
        raise ModelError(f"ref_model: {name} has other tokens than {own}; take a model with the same tokenizer")


def _mismatched(config: RunConfig, rows: Any) -> Any:
    """Feedback with mismatched answers, where its loss asks for them; anything else as it is."""
    if rows is None or config.finetuning.stage != "kto" or config.finetuning.kto_loss != "kto":
        return rows
    return MismatchedFeedback(rows, data_seed(config), config.data.cutoff_len)


def reference_model(config: RunConfig, given: Ingredients) -> Ingredients:
    """The model as it is, or the one that is named, for as long as it is asked."""
    name = config.finetuning.ref_model
    if name is None:
        return given
    args = _reference_args(config)
    given.reporter.note(f"reference: {name}")
    tokenizer = load_tokenizer(args)
    model = load_base_model(args, given.compute_dtype, given.device, tokenizer)
    segments = prepare_flat(model, args)
    forward = FlatForward(model, segments, share=config.finetuning.share_prompts and prepare_sharing(model, segments))
    return replace(given, forward=forward, output=find_output(forward, given.compute_dtype)[0])


def _reference_args(config: RunConfig) -> ModelArguments:
    """The arguments by which ``ref_model`` is loaded; revision and trust were given to the model of that name alone."""
    name, args = config.finetuning.ref_model, config.model
    other: dict[str, Any] = {"model_name_or_path": name, "checkpoint_dir": (), "quantization_bit": None}
    if name != args.model_name_or_path:
        other |= {"model_revision": "main", "trust_remote_code": False}
    return args.model_copy(update=other)


def _facts(config: RunConfig, given: Ingredients, line: Line) -> dict[str, object]:
    """What the reference's answers depend on."""
    named = config.finetuning.ref_model is not None
    args = _reference_args(config) if named else line.on(config.model)
    source = locate(args)
    folders = [source.path, *([source.adapter] if source.adapter else []), *([] if named else [a.path for a in line.ancestors])]
    return {
        "files": [file_sha(file) for folder in folders for file in sorted(folder.iterdir()) if _says_what_is_computed(file)],
        "tokens": [args.add_tokens, args.add_special_tokens, len(given.tokenizer)],
        "quantisation": [args.quantization_bit, args.quantization_type, args.double_quantization],
        "dtype": str(given.compute_dtype),
        "norms": [args.upcast_layernorm, args.layer_norm_names],
        "segments": [given.forward.segments, given.forward.share],
        **({} if named else _start(config)),
    }


def _start(config: RunConfig) -> dict[str, object]:
    """What a new adapter makes of the model: nothing, but for rounding, unless another method of PEFT begins it at random."""
    keys = ["finetuning_type", "pissa_init", "lora_rank"]
    if config.finetuning.finetuning_type != "peft":
        return {key: getattr(config.finetuning, key) for key in keys}
    keys += ["peft_method", "peft_args", "lora_target"]
    return {"seed": config.training.seed, **{key: getattr(config.finetuning, key) for key in keys}}


def _says_what_is_computed(file: Path) -> bool:
    """Weights, the settings of a model or adapter, and code that comes with it."""
    return file.suffix in (".safetensors", ".py") or file.name in (CONFIG, ADAPTER_CONFIG)


@dataclass(frozen=True)
class Reference:
    """Who answers.

    Attributes:
        loaded: gives the reference model, ready for flat batches; called only if something is to be computed.
        facts: all that its answers depend on beside the rows.
        ld_alpha: share of the tokens by which one answer is longer (see ``answer_logps``).
        batch_size: rows in a batch.
    """

    loaded: Callable[[], Ingredients]
    facts: dict[str, object]
    ld_alpha: float | None
    batch_size: int


def with_reference(rows: Rows[K], needed: np.ndarray, reference: Reference, reporter: Reporter) -> Referenced[K]:
    """The rows with the reference's log-probabilities.

    Args:
        rows: pairs or feedback.
        needed: numbers of those that will be asked for.
        reference: who answers.
        reporter: told how far it is.

    Raises:
        DataError: what was computed cannot be written.
        NonFiniteError: the reference gives a log-probability that is not finite.
    """
    key = json.dumps([rows.fingerprint(), reference.facts, reference.ld_alpha], sort_keys=True, default=str)
    file = cache_root() / "reference" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
    table = _read(file, len(rows))
    missing = needed[np.isnan(table[needed]).any(axis=1)]
    if len(missing):
        reporter.note(f"reference: log-probabilities of {len(missing):,} rows are computed once and kept")
        for count, _ in enumerate(_compute(rows, missing, reference, table), 1):
            if count % _SAVED_EVERY == 0:
                _write(file, table)
        _write(file, table)
    return Referenced(rows, table)


@torch.no_grad()
def _compute(rows: Rows[K], missing: np.ndarray, reference: Reference, table: np.ndarray) -> Iterator[None]:
    """Fill the table, the longest rows first; yields after each batch."""
    with torch.random.fork_rng():  # a run in which nothing is left to compute draws the same numbers
        given = reference.loaded()
    model = given.forward.model
    order: Sequence[int] = missing[np.argsort(-rows.lengths[missing], kind="stable")].tolist()
    training = model.training
    model.eval()
    try:
        for begin in range(0, len(order), reference.batch_size):
            chosen = order[begin : begin + reference.batch_size]
            batch = collate([rows[index] for index in chosen]).to(given.device)
            with out_of_memory_explained("in the reference's pass", [batch]):
                logps_2P = _logps(given, batch, reference.ld_alpha)
            if not bool(logps_2P.isfinite().all()):
                where = ", ".join(str(source) for source in batch.sources[: len(chosen)])
                raise NonFiniteError(f"the reference gives a log-probability that is not finite. Rows: {where}")
            table[chosen] = logps_2P.T.float().cpu().numpy()
            yield
    finally:
        model.train(training)


def _logps(given: Ingredients, batch: Batch, ld_alpha: float | None) -> torch.Tensor:
    """``[2, P]``: of both answers of each pair; of feedback, of the answer and the mismatched one (0 where there is none)."""
    sums_R, _ = answer_logps(batch, batch_logprobs(given, batch), ld_alpha)
    if batch.desirable_P is None:
        return torch.stack(sums_R.chunk(2))
    if batch.mismatched is None:
        return torch.stack([sums_R, torch.zeros_like(sums_R)])
    return torch.stack([sums_R, answer_logps(batch.mismatched, batch_logprobs(given, batch.mismatched))[0]])


def _read(file: Path, count: int) -> np.ndarray:
    empty = np.full((count, 2), np.nan, dtype=np.float32)
    try:
        found: np.ndarray = load_file(file)["logps"].numpy() if file.is_file() else empty
    except (OSError, SafetensorError, KeyError):
        return empty  # made anew
    return found if found.shape == empty.shape else empty


def _write(file: Path, table: np.ndarray) -> None:
    scratch = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"logps": torch.from_numpy(table)}, scratch)
        scratch.replace(file)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise DataError(f"{file}: cannot be written: {error}; free some space, or set TUNESMITH_HOME to another disk") from None

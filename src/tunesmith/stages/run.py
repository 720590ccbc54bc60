"""A complete run of any stage: data, model, training, evaluation, result. Stages differ by their trainer alone."""

from __future__ import annotations

import random
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from tunesmith.config.arguments import RunConfig
from tunesmith.config.load import dump_yaml, load_config
from tunesmith.config.policy import POLICY_STAGES
from tunesmith.data.kinds import KINDS, PAIR, PROMPT, Rows
from tunesmith.data.named import use_template
from tunesmith.data.prepare import load_examples, target_of
from tunesmith.data.prepare import load_rows as load_kind
from tunesmith.data.report import DataReport
from tunesmith.data.selection import Examples
from tunesmith.data.streaming import ExampleStream, load_stream
from tunesmith.data.template import ChatTemplate
from tunesmith.data.thinking import no_effect
from tunesmith.errors import CheckpointError, ConfigError
from tunesmith.model.adapter import count_parameters, drop_head, recompute_activations, save_finished, set_head, stop_at
from tunesmith.model.forward import FlatForward
from tunesmith.model.heads import head_width, starting_head
from tunesmith.model.library import quiet_library
from tunesmith.model.lineage import Line, line_of
from tunesmith.model.load import load_base_model, prepare_flat, prepare_sharing
from tunesmith.model.lora_kernel import install_lora_kernel
from tunesmith.model.output import Output, find_output
from tunesmith.model.precision import device_name, pick_device, resolve_dtype
from tunesmith.model.quantize import is_quantised
from tunesmith.model.settings import positions, read_settings
from tunesmith.model.source import Source, locate
from tunesmith.model.tokenizer import added_token_ids, check_added_tokens, load_tokenizer
from tunesmith.model.trial import small_logits, try_adapter
from tunesmith.model.tuning import init_adapter
from tunesmith.model.vocabulary import trainable_rows
from tunesmith.process import described
from tunesmith.stages.actors import with_actors
from tunesmith.stages.dpo import PreferencePeftTrainer
from tunesmith.stages.grpo import GRPOPeftTrainer
from tunesmith.stages.kernels import fuse_layers
from tunesmith.stages.kto import FeedbackPeftTrainer, balanced
from tunesmith.stages.plan import decide
from tunesmith.stages.ppo import PPOPeftTrainer
from tunesmith.stages.pretrain import PretrainPeftTrainer
from tunesmith.stages.reference import check_reference, referenced
from tunesmith.stages.rm import PairwisePeftTrainer
from tunesmith.stages.samples import sample_answers
from tunesmith.stages.sft import Seq2SeqPeftTrainer
from tunesmith.train.checkpoint import write_json
from tunesmith.train.progress import Reporter
from tunesmith.train.runfiles import CONFIG, DATA_REPORT, FINETUNING_ARGS, SAMPLES
from tunesmith.train.runfolder import claim, files_in, open_run, starting_point, write_manifest, write_results
from tunesmith.train.trainer import Ingredients, PeftTrainer

TRAINERS: dict[str, type[PeftTrainer]] = {
    "pt": PretrainPeftTrainer,
    "sft": Seq2SeqPeftTrainer,
    "rm": PairwisePeftTrainer,
    "dpo": PreferencePeftTrainer,
    "kto": FeedbackPeftTrainer,
    "ppo": PPOPeftTrainer,
    "grpo": GRPOPeftTrainer,
}
"""Stage -> trainer."""


def set_seed(seed: int) -> None:
    """Seed every generator in use."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def build_trainer(config: RunConfig, reporter: Reporter) -> tuple[PeftTrainer, DataReport]:
    """Data and model of a configuration, ready to train; nothing is written.

    Raises:
        TunesmithError: whatever is wrong with data, model or settings.
    """
    quiet_library()
    line = line_of(config.model)
    source = _source(config, line)
    tokenizer = _tokenizer(config, line, reporter)
    check_reference(config, tokenizer)
    report = DataReport()
    train, held_out = load_rows(config, tokenizer, report)
    for sentence in report.found if isinstance(train, ExampleStream) else report.lines():
        reporter.note(f"data: {sentence}")
    if config.finetuning.stage == "kto":
        assert isinstance(train, Rows)
        config, sentence = balanced(config, train)
        reporter.note(sentence)
    trainer, device = TRAINERS[config.finetuning.stage], pick_device()
    memory = decide(config, trainer, train, device)
    if memory.said:
        reporter.note(memory.said)
    set_seed(config.training.seed)
    dtype = resolve_dtype(config.compute_dtype, device)
    if remark := beyond_positions(source.path, source.trusted, config.data.cutoff_len, train, held_out):
        reporter.note(f"warning: {remark}")
    forward, attention = _model(config, line, source.name, tokenizer, dtype, device)
    if memory.recompute:
        recompute_activations(forward.model)
    fuse_layers(config, train, forward, dtype, device, reporter)
    trainable, total = count_parameters(forward.model)
    share = f"{trainable:,} of {total:,} parameters trained ({trainable / total:.2%})"
    reporter.note(f"model: {share}, computing in {str(dtype).removeprefix('torch.')} on {device_name(device)}")
    given = Ingredients(
        forward=forward,
        tokenizer=tokenizer,
        train_examples=train,
        eval_examples=held_out,
        device=device,
        compute_dtype=dtype,
        run=Path(config.training.output_dir),
        reporter=reporter,
        finetuning=config.finetuning,
        attention=attention,
        output=None if config.finetuning.stage == "rm" else _output(forward, dtype, reporter),
        shuffle=not config.data.disable_shuffling,
        capacity=config.data.cutoff_len if config.data.packing else None,
        inputs={
            "training data": train.fingerprint(),
            "checkpoint_dir": line.fingerprints(),
            "quantisation": [config.model.quantization_bit, config.model.quantization_type, config.model.double_quantization],
        },
        heaviest=memory.rehearsed,
    )
    if config.finetuning.stage in ("dpo", "kto"):
        given = referenced(config, given, line)
    if config.finetuning.stage in POLICY_STAGES:
        given = with_actors(config, given, line)
    return trainer(config.training, given), report


def _output(forward: FlatForward, dtype: torch.dtype, reporter: Reporter) -> Output | None:
    """How the model makes logits, or None, and why is said."""
    output, reason = find_output(forward, dtype)
    if output is None:
        reporter.note(f"note: losses are computed from all logits of this model: {reason}")
    return output


def beyond_positions(path: Path, trusted: bool, cutoff: int, *sets: Examples | Rows[Any] | ExampleStream | None) -> str | None:
    """That the longest row has more tokens than the model was made for, or None."""
    most = positions(read_settings(path, trusted))
    known = [cutoff if isinstance(rows, ExampleStream) else int(rows.lengths.max()) for rows in sets if rows is not None]
    if most is None or max(known) <= most:
        return None
    return f"the longest row has {max(known):,} tokens, and the model was made for {most:,}; set cutoff_len to that"


def _source(config: RunConfig, line: Line) -> Source:
    """Where the base is, its files checked."""
    source = locate(line.on(config.model))
    if source.adapter and config.finetuning.finetuning_type in ("lora", "peft"):
        raise ConfigError(
            f"model_name_or_path: {source.adapter} is an adapter, and one on top of it would have a base that exists nowhere; "
            f"set model_name_or_path: {source.path} and checkpoint_dir: {source.adapter}"
        )
    return source


def _tokenizer(config: RunConfig, line: Line, reporter: Reporter) -> PreTrainedTokenizerBase:
    """The tokenizer with the template asked for; what is remarkable of both is said."""
    tokenizer = load_tokenizer(line.on(config.model))
    for note in use_template(tokenizer, config.data.template):
        reporter.note(f"note: {note}")
    for sentence in no_effect(tokenizer, config.data.template_options):
        reporter.note(f"warning: {sentence}")
    for folder in line.adapters:
        check_added_tokens(tokenizer, added_token_ids(line.on(config.model), tokenizer), folder)
    return tokenizer


def _model(
    config: RunConfig,
    line: Line,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[FlatForward, str]:
    """The model, made trainable, and the library's attention that it was loaded with."""
    args = line.on(config.model)
    full = config.finetuning.finetuning_type == "full"
    base = load_base_model(args, torch.float32 if full else dtype, device, tokenizer)
    attention = base.config._attn_implementation
    segments = prepare_flat(base, args)
    begins_alike = target_of(config) in (PAIR.name, PROMPT.name)
    shares = begins_alike and config.finetuning.share_prompts and prepare_sharing(base, segments)
    rows = trainable_rows(base, added_token_ids(args, tokenizer))
    fresh = is_quantised(base) and not line.adapters and config.finetuning.finetuning_type == "peft"
    base_logits = small_logits(FlatForward(base, segments), dtype) if fresh else None
    model = init_adapter(base, config.finetuning, name, line, rows)
    if config.finetuning.stage == "rm":
        folders = [locate(args).path, *(ancestor.path for ancestor in line.ancestors)]
        set_head(model, starting_head(folders, head_width(base)))
    forward = FlatForward(model, segments, config.training.neftune_noise_alpha, shares)
    install_lora_kernel(forward, dtype)
    try_adapter(forward, dtype, base_logits)
    return forward, attention


def load_rows(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, report: DataReport
) -> tuple[Examples | Rows[Any] | ExampleStream, Examples | Rows[Any] | None]:
    """(train, eval) rows of a configuration, as its stage needs them, stored or streamed.

    Raises:
        DataError, TemplateError: data or tokenizer cannot be used.
    """
    if kind := KINDS.get(target_of(config)):
        return load_kind(config, tokenizer, report, kind)
    return (load_stream if config.data.streaming else load_examples)(config, tokenizer, report)


def run(config: RunConfig, reporter: Reporter) -> Path:
    """Train as a configuration says. Returns the run folder.

    Raises:
        TunesmithError: with everything up to the last checkpoint whole.
    """
    folder = claim(config.training)
    checkpoint = starting_point(config.training, folder, reporter.note)
    config = with_date(config, folder if checkpoint else None)
    if process := described():
        reporter.note(f"process: {process}")
    trainer, report = build_trainer(config, reporter)
    given, held_out = trainer.given, trainer.given.eval_examples
    open_run(folder, config.training.overwrite_output_dir)
    write_manifest(
        folder,
        str(locate(line_of(config.model).on(config.model)).path),
        {
            "data": {
                "train": given.train_examples.fingerprint(),
                "eval": held_out.fingerprint() if held_out is not None else None,
            },
            "seed": config.training.seed,
            "compute_dtype": str(given.compute_dtype).removeprefix("torch."),
        },
    )
    dump_yaml(config, folder / CONFIG)
    if checkpoint is None or not config.data.streaming:  # the account of a stream goes on where it was
        write_json(folder / DATA_REPORT, report.to_dict())
    if checkpoint is None:
        (folder / SAMPLES).unlink(missing_ok=True)
        sample_answers(config, trainer, "before", folder / SAMPLES)
    trainer.train(checkpoint)
    if trainer.loader.report is not None and trainer.loader.rows:
        for line in trainer.loader.report.lines():
            reporter.note(f"data: {line}")
    sample_answers(config, trainer, "after", folder / SAMPLES)
    _finish(config, trainer, folder)
    return folder


def with_date(config: RunConfig, resumed: Path | None) -> RunConfig:
    """Fix the day that templates see: the one given, the one of the run that is continued, or today."""
    day = config.data.template_date
    if day is None and resumed is not None and (resumed / CONFIG).is_file():
        day = load_config(resumed / CONFIG)[0].data.template_date
    day = day or date.today().isoformat()
    return config.model_copy(update={"data": config.data.model_copy(update={"template_date": day})})


def _finish(config: RunConfig, trainer: PeftTrainer, folder: Path) -> None:
    state, given = trainer.state, trainer.given
    existing = files_in(folder)
    if config.finetuning.stage != "pt" and config.finetuning.stage != "rm":
        stop_at(trainer.model, ChatTemplate(given.tokenizer, config.data.template_date).end_ids)
    if config.finetuning.stage == "ppo":
        drop_head(trainer.model)  # what answers are expected to be worth is of use in training alone
    try:
        save_finished(trainer.model, folder)
    except SafetensorError as error:  # its I/O errors are not OSError
        raise CheckpointError(
            f"{folder}: the result cannot be written: {error}; make room, and go on with resume_from_checkpoint=auto"
        ) from error
    given.tokenizer.save_pretrained(folder)
    given.finetuning.save_to_json(folder / FINETUNING_ARGS)
    write_results(
        folder,
        existing,
        {
            "steps": state.step,
            "epochs": trainer.loader.passes(state.epoch, state.window),
            "train_rows": trainer.loader.rows,
            "eval_rows": len(given.eval_examples) if given.eval_examples is not None else 0,
            f"best_{config.training.metric_for_best_model}": state.best_metric,
            "best_step": state.best_step,
            "loaded_best": config.training.load_best_model_at_end,
            "seconds": state.elapsed,
        },
    )

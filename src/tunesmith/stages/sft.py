"""Supervised fine-tuning: learn the assistant's turns of dialogues."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from tunesmith.config.arguments import GeneratingArguments, RunConfig
from tunesmith.config.load import dump_yaml
from tunesmith.data.prepare import DataReport, fingerprint, prepare_data, preprocess_data, split_examples
from tunesmith.generate.engine import ChatEngine, answering
from tunesmith.losses.cross_entropy import next_token_targets, token_nll
from tunesmith.model.adapter import count_parameters, init_adapter, save_finished
from tunesmith.model.forward import FlatForward
from tunesmith.model.library import quiet_library
from tunesmith.model.load import check_vocabulary, load_base_model, load_tokenizer, model_path, prepare_flat
from tunesmith.model.precision import pick_device, resolve_dtype
from tunesmith.train.checkpoint import write_json
from tunesmith.train.progress import Reporter
from tunesmith.train.runfolder import (
    CONFIG,
    DATA_REPORT,
    FINETUNING_ARGS,
    SAMPLES,
    claim,
    files_in,
    starting_point,
    write_manifest,
    write_results,
)
from tunesmith.train.trainer import Ingredients, PeftTrainer, autocast_of
from tunesmith.types import Batch, Example, LossOutput, Message


class Seq2SeqPeftTrainer(PeftTrainer):
    """Cross entropy on supervised tokens."""

    def compute_loss(self, batch: Batch) -> LossOutput:
        """Negative log-likelihood summed over the supervised tokens."""
        logits_SV, targets_S = self._logits(batch)
        return LossOutput(token_nll(logits_SV, targets_S).sum(), targets_S.numel())

    def prediction_step(self, batch: Batch) -> LossOutput:
        """The loss, and how many supervised tokens the model ranks first."""
        logits_SV, targets_S = self._logits(batch)
        hits = int((logits_SV.argmax(-1) == targets_S).sum())
        count = targets_S.numel()
        return LossOutput(token_nll(logits_SV, targets_S).sum(), count, {"accuracy": (hits, count)})

    def _logits(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        positions_S, targets_S = next_token_targets(batch.labels_T, batch.lengths)
        with autocast_of(self.given):
            return self.given.forward.logits(batch, positions_S), targets_S


def set_seed(seed: int) -> None:
    """Seed every generator in use."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def load_examples(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, report: DataReport
) -> tuple[list[Example], list[Example]]:
    """(train, eval) rows of a configuration; what became of each row goes to ``report``.

    Raises:
        DataError, TemplateError: naming file and row.
    """
    data, training = config.data, config.training
    seed = training.seed if training.data_seed is None else training.data_seed
    conversations = prepare_data(data, data.dataset, report, seed)
    train = preprocess_data(conversations, tokenizer, data.cutoff_len, report)
    if data.eval_dataset:
        held_out = prepare_data(data.model_copy(update={"source_prefix": ""}), data.eval_dataset, report, seed)
        return train, preprocess_data(held_out, tokenizer, data.cutoff_len, report)
    if share := data.val_size or data.dev_ratio:
        return split_examples(train, share, seed)
    return train, []


def run_sft(config: RunConfig, reporter: Reporter) -> Path:
    """A complete run: data, model, training, evaluation, finished adapter, samples. Returns the run folder.

    Raises:
        TunesmithError: with everything up to the last checkpoint whole.
    """
    quiet_library()
    training = config.training
    run = claim(training)
    tokenizer = load_tokenizer(config.model)
    report = DataReport()
    train, held_out = load_examples(config, tokenizer, report)
    for line in report.lines():
        reporter.note(f"data: {line}")
    checkpoint = starting_point(training, run, reporter.note)

    set_seed(training.seed)
    device = pick_device()
    dtype = resolve_dtype(config.compute_dtype, device)
    base_name = model_path(config.model)
    attention = "eager" if config.model.attn_implementation == "eager" else "sdpa"
    base = load_base_model(config.model, dtype, device, attention)
    check_vocabulary(base, tokenizer)
    segments = prepare_flat(base, config.model)
    model = init_adapter(base, config.finetuning, base_name)
    if training.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trainable, total = count_parameters(model)
    name = str(dtype).removeprefix("torch.")
    reporter.note(
        f"model: {trainable:,} of {total:,} parameters trained ({trainable / total:.2%}), computing in {name} on {device}"
    )

    hashes = {"train": fingerprint(train), "eval": fingerprint(held_out)}
    trainer = Seq2SeqPeftTrainer(
        training,
        Ingredients(
            FlatForward(model, segments), tokenizer, train, held_out, device, dtype, run, reporter, config.finetuning,
            shuffle=not config.data.disable_shuffling,
            inputs={"training data": hashes["train"]},
        ),
    )  # fmt: skip
    existing = files_in(run)
    dump_yaml(config, run / CONFIG)
    write_json(run / DATA_REPORT, report.to_dict())
    write_manifest(run, base_name, {"data": hashes, "seed": training.seed, "compute_dtype": name})
    before = sample_answers(config, model, tokenizer, "before", reporter) if checkpoint is None else []
    state = trainer.train(checkpoint)
    after = sample_answers(config, model, tokenizer, "after", reporter)

    save_finished(model, run)
    tokenizer.save_pretrained(run)
    config.finetuning.save_to_json(run / FINETUNING_ARGS)
    if before or after:
        lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in (*before, *after)]
        (run / SAMPLES).write_text("".join(lines), encoding="utf-8")
    write_results(
        run,
        existing,
        {
            "steps": state.step,
            "epochs": state.epoch + state.window / len(trainer.loader),
            "train_rows": len(train),
            "eval_rows": len(held_out),
            "best_eval_loss": state.best_metric,
            "best_step": state.best_step,
            "loaded_best": training.load_best_model_at_end,
            "seconds": state.elapsed,
        },
    )
    return run


def sample_answers(
    config: RunConfig, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, when: str, reporter: Reporter
) -> list[dict[str, str]]:
    """Greedy answers to ``sample_prompts``, one line each, and the same as records."""
    greedy = GeneratingArguments(do_sample=False, max_new_tokens=config.training.sample_max_new_tokens)
    samples: list[dict[str, str]] = []
    if not config.training.sample_prompts:
        return samples
    with answering(model):
        engine = ChatEngine(model, tokenizer)
        for prompt in config.training.sample_prompts:
            answer = engine.answer(_conversation(prompt, config.data.default_system), greedy)
            reporter.note(f"{when}: {prompt}  ->  {' '.join(answer.split())}")
            samples.append({"when": when, "prompt": prompt, "answer": answer})
    return samples


def _conversation(prompt: str, system: str | None) -> Sequence[Message]:
    opening = [Message("system", system)] if system is not None else []
    return [*opening, Message("user", prompt)]

"""The training loop. Stages override what a loss is; nothing else loops, steps or saves."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from tunesmith.config.arguments import FinetuningArguments, TrainingArguments
from tunesmith.config.optimizers import read_options
from tunesmith.config.rules import FREE_ON_RESUME, evaluates
from tunesmith.data.collator import collate
from tunesmith.data.kinds import Rows
from tunesmith.data.loader import Loader, StreamLoader, Window, make_loader, planned_updates
from tunesmith.data.selection import Examples
from tunesmith.data.streaming import ExampleStream
from tunesmith.errors import CheckpointError, DataError, Interrupted, ModelError
from tunesmith.model.adapter import load_trainable, save_trainable, trainable_parameters
from tunesmith.model.forward import FlatForward
from tunesmith.model.memory import out_of_memory_explained
from tunesmith.model.output import Output
from tunesmith.train.checkpoint import (
    TrainerState,
    checkpoint_path,
    load_state,
    prune,
    read_state,
    save_state,
    verify,
    write_atomically,
    write_json,
)
from tunesmith.train.optim.averaged import averaged, use_average, use_training_point
from tunesmith.train.optimizer import build_optimizer, build_schedule, optimizer_notice
from tunesmith.train.progress import Reporter
from tunesmith.train.runfiles import DATA_REPORT, FINETUNING_ARGS
from tunesmith.train.runlog import RunLog
from tunesmith.train.step import StepResult, Updater, add_metrics, means
from tunesmith.train.stopping import GivenUp, StopSignals
from tunesmith.types import Batch, LossOutput


@dataclass(frozen=True)
class Ingredients:
    """What a trainer needs beside its arguments.

    Attributes:
        forward: the model, ready for flat batches; its trainable parameters are float32.
        tokenizer: saved with each checkpoint.
        train_examples, eval_examples: tokenised rows; those to train on may be a stream, which has an order of its own.
        device: where batches go.
        compute_dtype: of matrix products.
        run: the run folder.
        reporter: told what happens.
        finetuning: saved with each checkpoint.
        attention: the library's attention that the model was loaded with, for generation.
        output: what the model does behind its hidden states; None: losses are computed from its logits.
        shuffle: False keeps file order.
        capacity: tokens of a pack of rows; None does not pack.
        inputs: facts that must be the same when the run is continued.
        heaviest: the micro-batch of the run that needs most memory, tried after the first update; None where there is no
            doubt that memory suffices.
    """

    forward: FlatForward
    tokenizer: PreTrainedTokenizerBase
    train_examples: Examples | Rows[Any] | ExampleStream
    eval_examples: Examples | Rows[Any] | None
    device: torch.device
    compute_dtype: torch.dtype
    run: Path
    reporter: Reporter
    finetuning: FinetuningArguments
    attention: str
    output: Output | None = None
    shuffle: bool = True
    capacity: int | None = None
    inputs: dict[str, Any] = field(default_factory=dict)
    heaviest: Batch | None = None


class PeftTrainer:
    """Trains whatever has ``requires_grad``: adapters or all weights.

    Subclasses override ``compute_loss``, and ``prediction_step`` where evaluation measures more than the loss.
    """

    def __init__(self, args: TrainingArguments, given: Ingredients) -> None:
        self.args = args
        self.given = given
        self.model = given.forward.model
        seed = args.seed if args.data_seed is None else args.data_seed
        self.loader = self.build_loader(seed)
        total = planned_updates(self.loader, args)
        self.state = TrainerState(total_steps=total, inputs=self._inputs(seed))
        self.optimizer = build_optimizer(args, given.finetuning, self.model, trainable_parameters(self.model))
        self.schedule = build_schedule(args, self.optimizer, total)
        fp16 = given.compute_dtype == torch.float16
        self.scaler = torch.amp.GradScaler(given.device.type) if fp16 else None
        self.updater = Updater(self.optimizer, args.max_grad_norm, self.scaler)
        self.stop = StopSignals(given.reporter.note)
        if notice := optimizer_notice(args, given.device):
            given.reporter.note(notice)

    def _inputs(self, seed: int) -> dict[str, Any]:
        arguments = {**self.args.model_dump(mode="json"), **self.given.finetuning.model_dump(mode="json")}
        fixed = {key: value for key, value in arguments.items() if key not in FREE_ON_RESUME}
        return {
            **fixed,
            "optim_args": read_options(self.args.optim, self.args.optim_args),
            "data_seed": seed,
            "shuffle": self.given.shuffle,
            "packing": self.given.capacity,
            "compute_dtype": str(self.given.compute_dtype).removeprefix("torch."),
            **self.given.inputs,
        }

    # ---- what stages override

    def build_loader(self, seed: int) -> Loader:
        """What gives the windows of the run."""
        given = self.given
        return make_loader(given.train_examples, self.args, seed, given.shuffle, given.capacity)

    def epoch_ended(self, planned: bool) -> bool:
        """Whether an epoch ends with the update that was just made; ``planned``: what the loader said before it."""
        return planned

    def save_more(self, folder: Path) -> None:
        """Write into a checkpoint what else the stage needs to go on."""

    def load_more(self, folder: Path) -> None:
        """Read what ``save_more`` wrote."""

    def compute_loss(self, batch: Batch) -> LossOutput:
        """Forward pass of one micro-batch: summed loss and its count."""
        raise TypeError(f"{type(self).__name__} trains nothing: a stage's trainer says what the loss is")

    def prediction_step(self, batch: Batch) -> LossOutput:
        """Forward pass of one evaluation batch, without gradients."""
        return self.compute_loss(batch)

    def watched(self, metrics: dict[str, tuple[float, int]]) -> dict[str, float]:
        """What is logged beside the loss, from the sums and counts of what was measured."""
        return means(metrics)

    # ---- the loop

    def train(self, checkpoint: Path | None = None) -> TrainerState:
        """Run to the planned number of updates.

        Args:
            checkpoint: continue from here.

        Returns:
            The final state; the model holds the last weights, or the best ones with ``load_best_model_at_end``.

        Raises:
            NonFiniteError, CheckpointError, Interrupted: after which earlier checkpoints are whole.
        """
        if checkpoint is not None:
            self._resume(checkpoint)
        log = RunLog(self.given.run, self.state.step)
        reporter = self.given.reporter
        with contextlib.ExitStack() as stack:
            stack.callback(log.close)
            stack.callback(reporter.stop)
            if self.state.step < self.state.total_steps:
                stack.callback(self.write_account)
            stack.enter_context(self.stop.heard())
            reporter.start(self.state.total_steps, self.state.step)
            if self.args.eval_on_start and self.state.step == 0 and self.given.eval_examples:
                self._evaluate(log)
            try:
                self._loop(log)
            finally:
                use_average(self.optimizer)
        if self.args.load_best_model_at_end:
            self._load_best()
        return self.state

    def _load_best(self) -> None:
        if self.state.best_step is None:
            return
        best = checkpoint_path(self.given.run, self.state.best_step)
        try:
            verify(best)
        except CheckpointError as error:
            self.given.reporter.note(f"the best checkpoint cannot be loaded, the last weights are kept: {error}")
            return
        load_trainable(self.model, best)

    def _loop(self, log: RunLog) -> None:
        state, began = self.state, time.monotonic()
        elapsed_before, steps_before = state.elapsed, state.step
        self.model.train()
        use_training_point(self.optimizer)
        with contextlib.closing(self.loader.onward(state.epoch, state.window, state.data)) as windows:
            while state.step < state.total_steps:
                batches, ended = self._next(windows)
                started = time.monotonic()
                rate = self.optimizer.param_groups[0]["lr"]
                result = self.training_step(batches)
                ended = self.epoch_ended(ended)
                state.epoch, state.window = (state.epoch + 1, 0) if ended else (state.epoch, state.window + 1)
                state.elapsed = elapsed_before + time.monotonic() - began
                if state.step % self.args.logging_steps == 0 or state.step in (1, state.total_steps):
                    pace = (state.elapsed - elapsed_before) / (state.step - steps_before)
                    self._log_step(log, result, rate, time.monotonic() - started, pace)
                if state.step == steps_before + 1 and self.given.heaviest is not None:
                    self._rehearse(self.given.heaviest)
                if ended and state.step < state.total_steps and isinstance(self.loader, StreamLoader):
                    self.given.reporter.note(f"end of the stream after update {state.step}; it begins again, in another order")
                self._after_step(log)

    def _next(self, windows: Iterator[Window]) -> Window:
        """The next window; if what makes it breaks off (a stream, a reward, a signal), what has been learned is saved."""
        try:
            return next(windows)
        except (DataError, ModelError, GivenUp) as error:
            if self.state.step and not checkpoint_path(self.given.run, self.state.step).is_dir():
                folder = self.save_checkpoint()
                self.given.reporter.note(f"the run broke off after update {self.state.step}; {folder} was written")
            if isinstance(error, GivenUp):
                raise self._interrupted() from None
            raise

    def training_step(self, window: Sequence[Batch]) -> StepResult:
        """One update on a window of micro-batches; counts it and its loss."""
        state = self.state
        with out_of_memory_explained(f"step {state.step + 1}", window):
            on_device = [batch.to(self.given.device) for batch in window]
            result = self.updater.update(on_device, self.compute_loss, state.step + 1)
        if not result.skipped:
            self.schedule.step()
        state.step += 1
        state.loss_sum += result.loss_sum
        state.loss_count += result.count
        state.metrics = add_metrics(state.metrics, result.metrics)
        return result

    def _rehearse(self, batch: Batch) -> None:
        """Run the batch that needs most, now that gradients and the optimizer's state are there, and forget it."""
        with out_of_memory_explained("the batch of this run that needs most memory, tried beforehand", [batch]):
            self.updater.rehearse(batch.to(self.given.device), self.compute_loss, self.args.gradient_accumulation_steps > 1)

    def _after_step(self, log: RunLog) -> None:
        state, args = self.state, self.args
        last = state.step == state.total_steps
        epoch_ended = state.window == 0
        improved = False
        if self.given.eval_examples and (last or self._due(self._eval_every(), epoch_ended)):
            improved = self._evaluate(log)
        every: dict[str, int | str] = {"steps": args.save_steps, "epoch": "epoch"}
        save_every = every.get(args.save_strategy)
        stopping = self.stop.number is not None
        due = save_every is not None and (last or self._due(save_every, epoch_ended))
        if due or stopping or (improved and args.load_best_model_at_end):
            self.save_checkpoint()
        if stopping and not last:
            raise self._interrupted()

    def _eval_every(self) -> int | str | None:
        if not evaluates(self.args):
            return None
        return "epoch" if self.args.eval_strategy == "epoch" else self.args.eval_steps or self.args.save_steps

    def _due(self, every: int | str | None, epoch_ended: bool) -> bool:
        if isinstance(every, int):
            return self.state.step % every == 0
        return every == "epoch" and epoch_ended

    def _interrupted(self) -> Interrupted:
        return self.stop.interrupted(f"step {self.state.step} of {self.state.total_steps}")

    # ---- evaluation

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss, and whatever ``prediction_step`` measures, over the evaluation rows; sums divided once."""
        self.model.eval()
        loss_sum, count = 0.0, 0.0
        sums: dict[str, tuple[float, int]] = {}
        for batch in self.eval_batches():
            with out_of_memory_explained("in evaluation (see per_device_eval_batch_size)", [batch]):
                output = self.prediction_step(batch.to(self.given.device))
            loss_sum += output.sum.item()
            count += output.count
            sums = add_metrics(sums, output.metrics)
        self.model.train()
        return {"eval_loss": loss_sum / count, **{f"eval_{name}": mean for name, mean in self.watched(sums).items()}}

    def eval_batches(self) -> Iterator[Batch]:
        """The evaluation rows, those of similar length together, the shortest first."""
        rows, size = self.given.eval_examples, self.args.per_device_eval_batch_size
        assert rows is not None
        order = np.argsort(rows.lengths, kind="stable").tolist()
        for begin in range(0, len(order), size):
            yield collate([rows[i] for i in order[begin : begin + size]])

    def _evaluate(self, log: RunLog) -> bool:
        with averaged(self.optimizer):
            metrics = self.evaluate()
        self._write(log, metrics)
        found, best = metrics[self.args.metric_for_best_model], self.state.best_metric
        higher = self.args.metric_for_best_model == "eval_reward"
        improved = self.state.step > 0 and (best is None or (found > best if higher else found < best))
        if improved:
            self.state.best_metric, self.state.best_step = found, self.state.step
        return improved

    # ---- logging

    def _log_step(self, log: RunLog, result: StepResult, rate: float, seconds: float, pace: float) -> None:
        state = self.state
        self._write(
            log,
            {
                "loss": state.loss_sum / state.loss_count,
                **self.watched(state.metrics),
                "learning_rate": rate,
                "grad_norm": None if result.skipped else result.grad_norm,
                "num_tokens": result.num_tokens,
                "step_seconds": round(seconds, 4),
                "tokens_per_second": round(result.num_tokens / seconds, 1),
                "remaining_time": _clock(pace * (state.total_steps - state.step)),
            },
        )
        state.loss_sum, state.loss_count, state.metrics = 0.0, 0, {}

    def _write(self, log: RunLog, values: dict[str, Any]) -> None:
        state = self.state
        entry = {
            "current_steps": state.step,
            "total_steps": state.total_steps,
            "epoch": round(self.loader.passes(state.epoch, state.window), 4),
            "percentage": round(100 * state.step / state.total_steps, 2),
            "elapsed_time": _clock(state.elapsed),
            **values,
        }
        log.write(entry)
        self.given.reporter.logged(entry)

    # ---- checkpoints

    def save_checkpoint(self) -> Path:
        """Write a checkpoint of this step and delete what ``save_total_limit`` no longer allows."""
        folder = checkpoint_path(self.given.run, self.state.step)
        self.state.data = self.loader.place()
        self.write_account()

        def fill(scratch: Path) -> None:
            save_trainable(self.model, scratch)
            save_state(scratch, self.state, self.optimizer, self.schedule, self.scaler)
            self.save_more(scratch)
            self.given.tokenizer.save_pretrained(scratch)
            self.given.finetuning.save_to_json(scratch / FINETUNING_ARGS)

        with averaged(self.optimizer):
            write_atomically(folder, fill)
        keep = {self.state.step} | ({self.state.best_step} if self.state.best_step is not None else set())
        prune(self.given.run, self.args.save_total_limit, keep)
        return folder

    def write_account(self) -> None:
        """Write what has become of the rows so far, where they are read while training goes on."""
        if self.loader.report is not None:
            write_json(self.given.run / DATA_REPORT, self.loader.report.to_dict())

    def _resume(self, folder: Path) -> None:
        saved = read_state(folder)["state"]
        changed = [
            f"{key}: {saved['inputs'].get(key)!r} then, {value!r} now"
            for key, value in self.state.inputs.items()
            if saved["inputs"].get(key) != value
        ]
        if changed:
            raise CheckpointError(f"{folder}: the run cannot be continued with other inputs:\n  " + "\n  ".join(changed))
        total = self.state.total_steps
        load_trainable(self.model, folder)
        self.state = load_state(folder, self.optimizer, self.schedule, self.scaler)
        self.load_more(folder)
        self.state.total_steps = total
        if self.state.step >= total:
            done = f"{self.state.step}/{total} updates"
            self.given.reporter.note(f"already complete ({done}); raise max_steps or num_train_epochs to go on")


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))

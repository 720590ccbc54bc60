"""The end of a run in a few lines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tunesmith.model.files import VALUE_HEAD
from tunesmith.train.checkpoint import list_checkpoints
from tunesmith.train.runfiles import LOSS_PLOT, read_results
from tunesmith.train.runlog import LOG_NAME, read_log


def summarize(run: Path) -> Iterator[str]:
    """What came out, where it lies, and what to type next."""
    results = read_results(run)
    entries = read_log(run)
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    evaluations = [(entry["current_steps"], entry["eval_loss"]) for entry in entries if "eval_loss" in entry]
    yield ""
    yield f"finished: {results['steps']} updates, {results['epochs']:.2f} epochs, {_duration(results['seconds'])}"
    if losses:
        yield f"  loss        {losses[0]:.4f} -> {losses[-1]:.4f}"
    if evaluations:
        yield f"  eval loss   {evaluations[0][1]:.4f} -> {evaluations[-1][1]:.4f}"
        perplexities = [entry["eval_perplexity"] for entry in entries if "eval_perplexity" in entry]
        if perplexities:
            yield f"  perplexity  {perplexities[0]:.2f} -> {perplexities[-1]:.2f}"
        kept = ", kept" if results["loaded_best"] else ""
        if results["best_step"] is not None:
            yield f"  best        {results['best_eval_loss']:.4f} at step {results['best_step']}{kept}"
    yield f"  result      {run}"
    yield f"  log         {run / LOG_NAME}"
    if (run / LOSS_PLOT).is_file():
        yield f"  curve       {run / LOSS_PLOT}"
    if checkpoints := list_checkpoints(run):
        yield f"  checkpoints {', '.join(path.name for path in checkpoints)}"
    if (run / VALUE_HEAD).is_file():
        yield f"it scores:   tunesmith predict {run} FILE"
    else:
        yield f"talk to it:  tunesmith chat {run}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"

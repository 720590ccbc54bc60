"""What lies in a run folder, by name, and what is read of it without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tunesmith.errors import CheckpointError

CONFIG = "config.yaml"
MANIFEST = "manifest.json"
RESULTS = "train_results.json"
SAMPLES = "samples.jsonl"
DATA_REPORT = "data_report.json"
FINETUNING_ARGS = "finetuning_args.json"
LOSS_PLOT = "training_loss.png"
ANSWERS = "eval_answers.jsonl"
"""Answers to the evaluation prompts with their rewards, one line each, of the newest evaluation of a policy."""
ROLLOUT_ADAPTER = "rollout_adapter"
"""Folder from which an engine elsewhere reads the policy."""


def is_finished(run: Path) -> bool:
    """Whether a run in this folder came to its end."""
    return (run / RESULTS).is_file()


def read_results(run: Path) -> dict[str, Any]:
    """What the end of the run wrote. Raises CheckpointError when it cannot be read."""
    try:
        results: dict[str, Any] = json.loads((run / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{run / RESULTS}: cannot be read: {error}") from None
    return results

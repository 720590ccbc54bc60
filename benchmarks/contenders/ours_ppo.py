"""tunesmith's stage ppo, by the calls that its ``train`` makes."""

from __future__ import annotations

import sys

from tunesmith import process

if __name__ == "__main__":
    process.prepare(sys.orig_argv)

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contenders.prompt_rows import CLOCKS, given_answer, prompt_ids
from tunesmith.config.load import load_config
from tunesmith.generate.flow import Answer
from tunesmith.model.library import quiet_library
from tunesmith.stages.policy import Engine, PolicyPeftTrainer
from tunesmith.stages.rollout import RolloutLoader
from tunesmith.stages.run import build_trainer
from tunesmith.train.progress import SilentReporter
from tunesmith.train.step import StepResult, means


class Given:
    """An engine that answers with the rows' own answers, in their order."""

    def __init__(self, tokenizer: Any, rows: Sequence[dict[str, str]], unit: dict[str, Any]) -> None:
        pairs = ((prompt_ids(tokenizer, row), given_answer(tokenizer, row, unit["new"])) for row in rows)
        self.pairs = [pair for pair in pairs if len(pair[0]) <= unit["cutoff"]]
        self.end, self.at = tokenizer.eos_token_id, 0

    def answers(self, prompts: Sequence[np.ndarray], args: Any, keys: Any, samples: int = 1, *rest: Any) -> list[list[Answer]]:
        """As ``BatchEngine``; the prompts have to be those of the rows."""
        found = []
        for prompt in prompts:
            ids, said = self.pairs[self.at]
            assert prompt.tolist() == ids, (self.at, prompt.tolist(), ids)
            found.append([Answer(np.array(said, np.int32), said[-1] == self.end)] * samples)
            self.at = (self.at + 1) % len(self.pairs)
        return found


class Timed:
    """An engine, and the seconds that it took."""

    def __init__(self, engine: Engine, clock: Callable[[], float]) -> None:
        self.engine, self.clock, self.seconds = engine, clock, 0.0

    def answers(self, *args: Any) -> list[list[Answer]]:
        """What the engine says."""
        began = self.clock()
        found = self.engine.answers(*args)
        self.seconds += self.clock() - began
        return found


class OurPpo:
    """A trainer of stage ppo, an iteration at a time.

    Args:
        folder: model folder.
        reward: adapter of the reward model.
        file: alpaca rows, JSON, taken in order.
        unit: the work unit.
        run: folder of the run; nothing is written to it.
    """

    def __init__(self, folder: str, reward: str, file: Path, unit: dict[str, Any], run: Path) -> None:
        answers, size = unit["prompts"] * unit["samples"], unit["batch"]
        if answers % size:
            raise SystemExit(f"{answers} answers of a rollout are not a multiple of --batch {size}; give another one")
        self.updates = unit["epochs"] * (answers // size)
        settings = {
            "stage": "ppo", "model_name_or_path": folder, "reward_model": reward, "dataset": str(file), "output_dir": str(run),
            "compute_dtype": unit["dtype"], "cutoff_len": unit["cutoff"], "truncation": "drop", "disable_shuffling": True,
            "per_device_train_batch_size": size, "ppo_buffer_size": answers // size, "ppo_epochs": unit["epochs"],
            "num_generations": unit["samples"], "max_new_tokens": unit["new"], "learning_rate": unit["rate"],
            "max_steps": unit["steps"] * self.updates, "score_norm": False, **unit["settings"],
        }  # fmt: skip
        config, _ = load_config(None, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
        trainer, _ = build_trainer(config, SilentReporter())
        assert isinstance(trainer, PolicyPeftTrainer) and trainer.given.actors is not None
        actors = trainer.given.actors
        given = Given(trainer.given.tokenizer, json.loads(file.read_text(encoding="utf-8")), unit) if unit["given"] else None
        self.clock = CLOCKS[unit["clock"]]
        self.engine = Timed(given or actors.engine, self.clock)
        trainer.given = replace(trainer.given, actors=replace(actors, engine=self.engine))
        trainer.model.train()
        self.trainer, self.windows = trainer, trainer.loader.onward(0, 0, {})
        self.first: dict[str, float] = {}

    def iterate(self) -> dict[str, Any]:
        """A rollout, and all updates on it."""
        self.engine.seconds = 0.0
        began = self.clock()
        window, _ = next(self.windows)
        collected, rollout = self.clock(), self.engine.seconds
        assert isinstance(self.trainer.loader, RolloutLoader)
        batches = self.trainer.loader.batches
        results = [self.trainer.training_step(window)]
        results += [self.trainer.training_step(next(self.windows)[0]) for _ in range(self.updates - 1)]
        done = self.clock()
        losses = [_losses(result) for result in results]
        self.first = self.first or losses[0]
        lengths = [length for batch in batches for length in batch.lengths]
        return {
            "seconds": done - began, "rollout": rollout, "scoring": collected - began - rollout, "updates": done - collected,
            "tokens": sum(batch.num_targets for batch in batches), "answers": len(lengths), "losses": losses,
            "first": self.first, "real": sum(lengths),
            "positions": sum(lengths) - sum(batch.num_repeated for batch in batches),
        }  # fmt: skip


def _losses(result: StepResult) -> dict[str, float]:
    found = means(result.metrics)
    named = {name: found[f"{name}_loss"] for name in ("policy", "value")}
    return {"loss": result.loss_sum / result.count, **named, "entropy": found["entropy"], "norm": result.grad_norm}


def main() -> None:
    """Answer each line with an iteration."""
    quiet_library()
    folder, reward, rows, unit = sys.argv[1], sys.argv[2], Path(sys.argv[3]), json.loads(sys.argv[4])
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["TUNESMITH_HOME"] = scratch  # nothing computed before is found
        loop = OurPpo(folder, reward, rows, unit, Path(scratch) / "run")
        print(json.dumps({"ready": "tunesmith"}), flush=True)
        for _ in sys.stdin:
            print(json.dumps(loop.iterate()), flush=True)


if __name__ == "__main__":
    main()

"""tunesmith, by the calls that its ``train`` makes."""

from __future__ import annotations

import sys

from tunesmith import process

process.prepare(sys.orig_argv)

import json  # noqa: E402
import os  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402


def main() -> None:
    """Answer each line with an update."""
    from tunesmith.config.load import load_config
    from tunesmith.model.library import quiet_library
    from tunesmith.stages import run
    from tunesmith.train.progress import SilentReporter

    quiet_library()
    model, rows, unit = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["TUNESMITH_HOME"] = scratch  # nothing computed before is found
        settings = {
            "model_name_or_path": model, "dataset": str(rows), "output_dir": f"{scratch}/run",
            "compute_dtype": "bf16", "per_device_train_batch_size": unit["batch"], "cutoff_len": unit["cutoff"],
            "learning_rate": unit["rate"], "max_steps": unit["steps"], "disable_shuffling": True, "truncation": "keep_start",
            "gradient_checkpointing": False, **unit["settings"],
        }  # fmt: skip
        config, _ = load_config(None, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
        referenced, once = run.referenced, 0.0

        def timed(*args: Any) -> Any:
            nonlocal once
            began = time.perf_counter()
            found = referenced(*args)
            once = time.perf_counter() - began
            return found

        run.referenced = timed
        trainer, _ = run.build_trainer(config, SilentReporter())
        trainer.model.train()
        print(json.dumps({"ready": "tunesmith", "once": once, "pairs": unit["steps"] * unit["batch"]}), flush=True)
        clock = time.process_time if unit.get("clock") == "cpu" else time.perf_counter
        windows = trainer.loader.onward(0, 0, {})
        for _ in sys.stdin:
            began = clock()
            window, _ = next(windows)
            result = trainer.training_step(window)
            seconds = clock() - began
            answer = {"seconds": seconds, "tokens": result.num_tokens, "loss": result.loss_sum / result.count}
            print(json.dumps({**answer, "common": sum(batch.num_repeated for batch in window)}), flush=True)


if __name__ == "__main__":
    main()

"""``python -m benchmarks.steps [tokens] [batch] [length] [rows] [--data DIR] [--write]``: how a step's cost grows.

- ``tokens``: time of an update against its real tokens, batches of 1 to 16 rows of ``alpaca_en_demo`` in order, with straight
  lines through single updates and through the means of each number of rows.
- ``batch``: tokens a second and peak memory against tokens in a batch, blocks of 512 tokens of ``wiki_demo``.
- ``length``: the same against the length of a block, 4,096 tokens in a batch.
- ``rows``: peak memory of five updates against the rows of a data set.

SmolLM2-135M in bf16, LoRA rank 8 on all linear layers, one thread; every point in a process of its own; the clock is the
processor's, so another process beside this one does not count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.growth import write_rows
from benchmarks.machine import facts, highest_memory, last_line, own_memory
from tunesmith.process import prepare

WARM_UP, UPDATES = 1, 6
ROWS_IN_BATCH = (1, 2, 4, 8, 16)
BATCH_TOKENS = (512, 1024, 2048, 4096, 8192)
BLOCK = 512
LENGTHS = (128, 256, 512, 1024, 2048, 4096)
LENGTHS_TOKENS = 4096
DATA_ROWS = (1_000, 10_000, 100_000)


def main() -> None:
    """Measure and print; with ``--one`` train in this process."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps")
    parser.add_argument("what", nargs="*", default=[*GROWTHS], help=f"of {', '.join(GROWTHS)}; all if none is named")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/demo", help="folder of the demo sets")
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results/")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        prepare(sys.orig_argv)
        print(json.dumps(_train(json.loads(args.one))))
        return
    if unknown := set(args.what) - set(GROWTHS):
        parser.error(f"no such growth: {', '.join(unknown)}; there are {', '.join(GROWTHS)}")
    found = {name: GROWTHS[name](args.data.resolve()) for name in args.what}
    if args.write:
        machine = facts(1)
        target = ROOT / "benchmarks/results" / f"{machine['date']}-steps.json"
        before = json.loads(target.read_text(encoding="utf-8"))["result"] if target.exists() else {}
        whole = {"machine": machine, "result": {**before, **found}}
        target.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        print(f"kept in {target.relative_to(ROOT)}")


def line_through(points: list[tuple[float, float]]) -> dict[str, float]:
    """``y = a + b x`` by least squares; R2 and the largest distance of a point from it, as a share of the point's y."""
    xs, ys = zip(*points, strict=True)
    b, a = statistics.linear_regression(xs, ys)
    mean = statistics.mean(ys)
    left = [y - a - b * x for x, y in points]
    r2 = 1 - sum(e * e for e in left) / sum((y - mean) ** 2 for y in ys)
    return {"a": a, "b": b, "r2": r2, "largest_residual": max(abs(e) / y for e, y in zip(left, ys, strict=True))}


def tokens(data: Path) -> dict[str, Any]:
    """Time against real tokens."""
    print("\n| rows in a batch | real tokens, mean | ms an update, mean |\n|---|---|---|")
    singles, points = [], []
    for batch in ROWS_IN_BATCH:
        found = _point(data, dataset="alpaca_en_demo", cutoff_len=1024, per_device_train_batch_size=batch)
        singles += list(zip(found["tokens"], found["seconds"], strict=True))
        points.append((statistics.mean(found["tokens"]), statistics.mean(found["seconds"])))
        print(f"| {batch} | {points[-1][0]:,.0f} | {1e3 * points[-1][1]:,.0f} |", flush=True)
    fits = {"means": line_through(points), "single updates": line_through(singles)}
    for name, fit in fits.items():
        print(f"{name}: {1e3 * fit['a']:.0f} ms + {1e3 * fit['b']:.3f} ms x tokens, R2 {fit['r2']:.4f}, largest residual "
              f"{fit['largest_residual']:.1%}")  # fmt: skip
    return {**fits, "points": singles}


def batch(data: Path) -> list[dict[str, float]]:
    """Speed and memory against tokens in a batch."""
    return _blocks(data, [(BLOCK, count // BLOCK) for count in BATCH_TOKENS])


def length(data: Path) -> list[dict[str, float]]:
    """Speed and memory against the length of a block."""
    return _blocks(data, [(size, LENGTHS_TOKENS // size) for size in LENGTHS])


def rows(_: Path) -> list[dict[str, float]]:
    """Peak memory against the rows of a data set."""
    print("\n| rows | peak MiB of five updates | at their end, pages of files aside |\n|---|---|---|")
    table = []
    for count in DATA_ROWS:
        with tempfile.TemporaryDirectory() as folder:
            write_rows(Path(folder) / "rows.jsonl", count)
            found = _point(Path(folder), dataset=f"{folder}/rows.jsonl", per_device_train_batch_size=4, updates=5)
        table.append({"rows": count, "peak": round(found["peak"]), "own": round(found["own"])})
        print(f"| {count:,} | {found['peak']:,.0f} | {found['own']:,.0f} |", flush=True)
    return table


GROWTHS: dict[str, Callable[[Path], Any]] = {"tokens": tokens, "batch": batch, "length": length, "rows": rows}


def _blocks(data: Path, sizes: list[tuple[int, int]]) -> list[dict[str, float]]:
    print("\n| tokens of a block | blocks in a batch | tokens/s | peak MiB |\n|---|---|---|---|")
    table = []
    for size, count in sizes:
        updates = max(3, 4096 // (size * count))
        found = _point(
            data, stage="pt", dataset="wiki_demo", cutoff_len=size, per_device_train_batch_size=count, updates=updates
        )
        speed = sum(found["tokens"]) / sum(found["seconds"])
        table.append({"length": size, "blocks": count, "tokens_per_second": round(speed, 1), "peak": round(found["peak"])})
        print(f"| {size:,} | {count} | {speed:.0f} | {found['peak']:,.0f} |", flush=True)
    return table


def _point(data: Path, updates: int = UPDATES, **settings: Any) -> Any:
    with tempfile.TemporaryDirectory() as scratch:
        unit = {
            "model_name_or_path": "builtin:smollm2-135m", "output_dir": f"{scratch}/run", "dataset_dir": str(data),
            "compute_dtype": "bf16", "max_steps": WARM_UP + updates, "disable_shuffling": True, "truncation": "keep_start",
            "gradient_checkpointing": False, "learning_rate": 1e-4, **settings,
        }  # fmt: skip
        return last_line([sys.executable, "-m", "benchmarks.steps", "--one", json.dumps(unit)])


def _train(settings: dict[str, Any]) -> dict[str, Any]:
    """Real tokens and seconds of each update behind the warm-up, and the highest memory of the process."""
    from tunesmith.config.load import load_config
    from tunesmith.model.library import quiet_library
    from tunesmith.stages.run import build_trainer
    from tunesmith.train.progress import SilentReporter

    quiet_library()
    config, _ = load_config(None, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
    trainer, _ = build_trainer(config, SilentReporter())
    trainer.model.train()
    tokens, seconds = [], []
    for number, (window, _) in zip(range(config.training.max_steps), trainer.loader.onward(0, 0, {}), strict=False):
        began = time.process_time()
        result = trainer.training_step(window)
        if number >= WARM_UP:
            seconds.append(time.process_time() - began)
            tokens.append(result.num_tokens)
    return {"tokens": tokens, "seconds": seconds, "peak": highest_memory(), "own": own_memory()}


if __name__ == "__main__":
    main()

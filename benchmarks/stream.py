"""``python -m benchmarks.stream memory|ahead``: a stream without a model.

``memory`` pulls the batches of one pass over generated files of about 100 bytes a row, each size in a process of its own, and
prints the peak of its resident memory. ``ahead`` pulls batches beside work that takes a fixed time, by turns with buffers
filled by the thread and in the loop itself: work that waits, as for a GPU, and work of many small products.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from transformers import AutoTokenizer

from benchmarks import ROOT
from tunesmith.config.load import load_config
from tunesmith.data import prefetch
from tunesmith.data.loader import StreamLoader
from tunesmith.data.report import DataReport
from tunesmith.data.streaming import load_stream
from tunesmith.model.builtin import fetch

WORDS = "the cat sat on a mat and saw one red bird fly over two small green hills while rain fell".split()  # noqa: SIM905


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stream")
    parser.add_argument("what", choices=["memory", "ahead", "pass"])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--file", type=Path, help="of pass: one pass over this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.what == "pass":
        one_pass(args.file)
        return
    with tempfile.TemporaryDirectory() as scratch:
        if args.what == "ahead":
            ahead(write(Path(scratch) / "rows.jsonl", 100_000))
        for count in args.rows if args.what == "memory" else ():
            file = write(Path(scratch) / f"{count}.jsonl", count)
            command = [sys.executable, "-m", "benchmarks.stream", "pass", "--file", str(file)]
            print(f"{count:>9,} rows, {file.stat().st_size >> 20:>4} MiB: ", end="", flush=True)
            subprocess.run(command, check=True, cwd=ROOT)
            file.unlink()


def write(file: Path, count: int) -> Path:
    """Alpaca rows of about 100 bytes."""
    generator = random.Random(0)
    with file.open("w", encoding="utf-8") as sink:
        for _ in range(count):
            row = {"instruction": " ".join(generator.choices(WORDS, k=6)), "output": " ".join(generator.choices(WORDS, k=10))}
            sink.write(json.dumps(row) + "\n")
    return file


def loader_of(file: Path) -> StreamLoader:
    """Batches of 32 rows of a file."""
    model = str(fetch("smollm2-135m"))
    values = {"model_name_or_path": model, "dataset": file, "output_dir": "none", "streaming": "true", "max_steps": 1}
    config, _ = load_config(None, [f"{key}={value}" for key, value in values.items()])
    return StreamLoader(load_stream(config, AutoTokenizer.from_pretrained(model), DataReport())[0], 32)


def one_pass(file: Path) -> None:
    """Pull every batch once."""
    loader = loader_of(file)
    began, before = time.perf_counter(), peak()
    windows = loader.onward(0, 0, {})
    while not next(windows)[1]:
        pass
    seconds = time.perf_counter() - began
    windows.close()
    state = len(json.dumps(loader.place()))
    memory = f"peak {peak():,.0f} MiB ({before:,.0f} before the first row)"
    print(f"{memory}, {loader.rows / seconds:,.0f} rows/s, {state} bytes of state")


def peak() -> float:
    """MiB of resident memory at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def ahead(file: Path) -> None:
    """Compare the thread with filling buffers in the loop."""
    square = torch.randn(64, 64)

    def products() -> None:
        for _ in range(1500):
            square @ square

    kinds: dict[str, Callable[[], object]] = {"waiting 20 ms": lambda: time.sleep(0.02), "1,500 small products": products}
    for name, work in kinds.items():
        times: dict[str, list[float]] = {"alone": [], "buffers filled in the loop": [], "by the thread": []}
        for _ in range(3):
            times["alone"].append(timed(work))
            with mock.patch("tunesmith.data.loader.made_ahead", in_the_loop):
                times["buffers filled in the loop"].append(steps(loader_of(file), work))
            times["by the thread"].append(steps(loader_of(file), work))
        figures = (f"{how} {statistics.median(seconds):.1f} ms" for how, seconds in times.items())
        print(f"{name}, a step: {', '.join(figures)}", flush=True)


def timed(work: Callable[[], object]) -> float:
    """Milliseconds that work takes alone."""
    began = time.perf_counter()
    for _ in range(200):
        work()
    return 5 * (time.perf_counter() - began)


def steps(loader: StreamLoader, work: Callable[[], object]) -> float:
    """Milliseconds a step over two buffers of 512 steps, from the middle of one on, when the next is ready."""
    windows = loader.onward(0, 0, {})
    for _ in range(256):
        next(windows)
        work()
    began = time.perf_counter()
    for _ in range(1024):
        next(windows)
        work()
    seconds = time.perf_counter() - began
    windows.close()
    return 1000 * seconds / 1024


@contextlib.contextmanager
def in_the_loop(make: Callable[[prefetch.Stopped], Iterator[object]]) -> Iterator[Iterator[object]]:
    """``made_ahead`` without its thread."""
    yield make(lambda: False)


if __name__ == "__main__":
    sys.exit(main())

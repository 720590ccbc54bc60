"""``python -m benchmarks.growth [--rows 10000 100000 1000000]``: time and memory of preparing rows against their number.

Each count runs in a process of its own, twice: the rows of about 100 bytes are tokenised, then found again.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = [
    "time",
    "year",
    "people",
    "way",
    "day",
    "man",
    "thing",
    "woman",
    "life",
    "child",
    "world",
    "school",
    "state",
    "family",
    "student",
    "group",
    "country",
    "problem",
]


def main() -> None:
    """Measure and print; with ``--one`` measure one preparation in this process."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(_prepare(args.one)))
        return
    print(f"{'rows':>9} {'us/row':>8} {'peak MiB':>9} {'again s':>8}")
    for count in args.rows:
        with tempfile.TemporaryDirectory() as scratch:
            write_rows(Path(scratch) / "rows.jsonl", count)
            first, second = (_measure(Path(scratch)) for _ in range(2))
            print(f"{count:9,} {first['seconds'] / count * 1e6:8.1f} {first['peak']:9.0f} {second['seconds']:8.2f}", flush=True)


def write_rows(file: Path, count: int) -> None:
    """Alpaca rows of about 100 bytes, one a line."""
    draw = random.Random(0)
    with file.open("w", encoding="utf-8") as out:
        for number in range(count):
            words = draw.choices(WORDS, k=9)
            row = {"instruction": f"{number} " + " ".join(words[:4]), "input": "", "output": " ".join(words[4:])}
            out.write(json.dumps(row) + "\n")


def _measure(folder: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.growth", "--one", str(folder)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def _prepare(folder: Path) -> dict[str, float]:
    """Seconds and peak memory (MiB) of preparing ``rows.jsonl``, imports and the tokenizer's loading aside."""
    from transformers import AutoTokenizer

    from tunesmith.config.arguments import DataArguments, DatasetAttr
    from tunesmith.data.pipeline import Place, tokenised
    from tunesmith.data.prepare import make_recipe
    from tunesmith.model.builtin import fetch

    tokenizer = AutoTokenizer.from_pretrained(str(fetch("smollm2-135m")))
    attr = DatasetAttr(dataset_name="rows", file_name="rows.jsonl")
    began = time.perf_counter()
    store = tokenised(attr, str(folder), None, make_recipe(DataArguments(), "conversation"), tokenizer, Place(folder / "store"))
    seconds = time.perf_counter() - began
    assert len(store) == store.progress.report.read
    return {"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


if __name__ == "__main__":
    main()

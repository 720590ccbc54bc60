"""``python -m benchmarks.arithmetic GSM8K.jsonl FOLDER [--count 800]``: pairs of which one answer is right, and can be checked.

Of each solution of GSM8K (arXiv 2110.14168) one calculation is given another result, and only there; a reader sees it by doing
the sum, or by the steps behind it going on with another number. Written are ``arithmetic.jsonl`` and its entry in
``dataset_info.json``, for ``stage: rm`` or ``dpo``. The same file, count and seed give the same pairs.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

CALCULATION = re.compile(r"<<[^<>]*=([0-9]+)>>\1(?![0-9.])")
"""A calculation as GSM8K marks it, and its result as the text has it: a whole number."""
MARK = re.compile(r"<<[^<>]*>>")


def main() -> None:
    """Write the pairs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.arithmetic", description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.source.read_text(encoding="utf-8").splitlines() if line]
    random.Random(args.seed).shuffle(rows)
    made = [pair for row in rows for pair in corrupted(row, args.seed)][: args.count]
    args.folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(pair, ensure_ascii=False) + "\n" for pair in made]
    (args.folder / "arithmetic.jsonl").write_text("".join(lines), encoding="utf-8")
    columns = {"prompt": "question", "chosen": "right", "rejected": "wrong"}
    entry = {"arithmetic": {"file_name": "arithmetic.jsonl", "ranking": True, "columns": columns}}
    (args.folder / "dataset_info.json").write_text(json.dumps(entry, indent=2) + "\n", encoding="utf-8")
    print(f"{len(made)} pairs in {args.folder}")


def corrupted(row: dict[str, str], seed: int) -> Iterator[dict[str, str]]:
    """The pair of a solution; none if no calculation of it has a whole number as its result.

    Example:
        ``48/2 = <<48/2=24>>24 clips`` -> right ``48/2 = 24 clips``, wrong ``48/2 = 29 clips``.
    """
    answer = row["answer"]
    found = list(CALCULATION.finditer(answer))
    if not found:
        return
    draw = random.Random(f"{seed} {row['question']}")
    chosen = draw.choice(found)
    result = int(chosen[1])
    other = result + draw.choice([-1, 1]) * draw.randint(1, max(result // 2, 2))
    other = other if other >= 0 and other != result else result + 1
    wrong = f"{answer[: chosen.start()]}{other}{answer[chosen.end() :]}"
    yield {"question": row["question"], "right": MARK.sub("", answer), "wrong": MARK.sub("", wrong)}


if __name__ == "__main__":
    main()

"""``python -m benchmarks.preprocess [--rows N] [--against trl]``: rows a second, by turns.

Each turn measures the tokenizer's own ceiling (``encode_batch_fast`` of the finished texts, a fresh tokenizer), then this
package from file to store (read, convert, render, tokenise, mask, write), then, if asked, TRL's preparation of the same rows
in a virtual environment of its own. Medians and ratios are printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

from transformers import AutoTokenizer

from benchmarks import ROOT
from tunesmith.config.arguments import DataArguments, DatasetAttr
from tunesmith.data.pipeline import Place, tokenised
from tunesmith.data.prepare import make_recipe
from tunesmith.model.builtin import fetch

TRL = "1.16.0"
_TRL_SCRIPT = """
import json, sys, time
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer
rows = [json.loads(line) for line in open(sys.argv[2], encoding="utf-8")]
join = lambda r: "\\n".join(p for p in (r["instruction"], r["input"]) if p)
data = Dataset.from_list([{"prompt": [{"role": "user", "content": join(r)}],
                           "completion": [{"role": "assistant", "content": r["output"]}]} for r in rows])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                     num_attention_heads=1))
args = SFTConfig(output_dir=sys.argv[3], max_length=1024, report_to=[], bf16=False)
began = time.perf_counter()
SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer)
print(time.perf_counter() - began)
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.preprocess")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--data", type=Path, default=ROOT / "examples/data/general.jsonl", help="alpaca rows, .json or .jsonl")
    parser.add_argument("--against", choices=["trl"])
    args = parser.parse_args()
    text = args.data.read_text(encoding="utf-8")
    rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines() if line]
    rows = [{**rows[i % len(rows)], "input": f"{rows[i % len(rows)].get('input', '')}"} for i in range(args.rows)]
    model = str(fetch("smollm2-135m"))
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "rows.jsonl"
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        python = _trl(Path(scratch)) if args.against == "trl" else None
        times: dict[str, list[float]] = {"ceiling": [], "tunesmith": [], **({"trl": []} if python else {})}
        for _ in range(args.turns):
            times["ceiling"].append(_ceiling(model, rows))
            times["tunesmith"].append(_ours(model, file, Path(scratch)))
            if python:
                times["trl"].append(_theirs(python, model, file, Path(scratch)))
    rates = {name: args.rows / statistics.median(seconds) for name, seconds in times.items()}
    for name, rate in rates.items():
        print(f"{name:10} {rate:8.0f} rows/s")
    print(f"share of the ceiling {_ratio(times['ceiling'], times['tunesmith']):.0%}")
    if "trl" in times:
        print(f"against TRL {TRL}    {_ratio(times['trl'], times['tunesmith']):.1f}x")


def _ratio(theirs: list[float], ours: list[float]) -> float:
    """Median over the turns, so that a slow moment of the machine touches both sides of a ratio."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


def _ceiling(model: str, rows: list[dict[str, str]]) -> float:
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = []
    for row in rows:
        question = "\n".join(part for part in (row["instruction"], row["input"]) if part)
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
        texts.append(tokenizer.apply_chat_template(turns, tokenize=False))
    began = time.perf_counter()
    tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return time.perf_counter() - began


def _ours(model: str, file: Path, scratch: Path) -> float:
    tokenizer = AutoTokenizer.from_pretrained(model)
    attr = DatasetAttr(dataset_name="rows", file_name=file.name)
    recipe = make_recipe(DataArguments(cutoff_len=1024), "conversation")
    began = time.perf_counter()
    store = tokenised(attr, str(file.parent), None, recipe, tokenizer, Place(scratch / "store", overwrite=True))
    elapsed = time.perf_counter() - began
    assert store.progress.report.read == sum(1 for _ in file.open(encoding="utf-8"))
    return elapsed


def _trl(scratch: Path) -> Path:
    """Python of a virtual environment that has TRL."""
    folder = ROOT / ".venv-trl"
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "-c", str(ROOT / "requirements/constraints.txt")]
        subprocess.run([*install, "torch", f"trl=={TRL}"], check=True)
    (scratch / "trl_turn.py").write_text(_TRL_SCRIPT, encoding="utf-8")
    return python


def _theirs(python: Path, model: str, file: Path, scratch: Path) -> float:
    command = [str(python), str(scratch / "trl_turn.py"), model, str(file), str(scratch / "trl_run")]
    done = subprocess.run(
        command,
        check=True,
        capture_output=True,
        text=True,
        env={"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": tempfile.mkdtemp(dir=scratch), "PATH": "/usr/bin"},
    )
    return float(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main())

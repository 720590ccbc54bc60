"""Fixtures: a tiny tokenizer, a tiny model, a tiny data set, all made here, so that no download is needed."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import contextlib
import io
import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "saw",
    "one",
    "red",
    "bird",
    "fly",
    "over",
    "two",
    "small",
    "green",
    "hills",
    "while",
    "rain",
    "fell",
    "你好",
    "世界",
    "很",
    "高兴",
]


@pytest.fixture(scope="session", autouse=True)
def data_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenised rows of the tests stay among the tests."""
    folder = tmp_path_factory.mktemp("data-cache")
    os.environ["TUNESMITH_DATA_CACHE"] = str(folder)
    return folder


@pytest.fixture
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"needs the shared data folder {SHARED}, which is absent")
    return SHARED


def make_tokenizer(folder: Path, pad_is_eos: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([" ".join(WORDS)] * 20 + ["system user assistant\n"] * 20, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>" if pad_is_eos else "<|endoftext|>",
    )
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    return fast


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with grouped queries and a ChatML tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-model")
    tokenizer = make_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Alpaca rows of very different lengths."""
    rng = random.Random(seed)

    def say(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    return [{"instruction": say(1, 12), "input": "", "output": say(1, 40)} for _ in range(count)]


def write_dataset(folder: Path, rows: list[Any], name: str = "rows", **entry: Any) -> Path:
    """Write rows as JSONL and register them."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    registry = folder / "dataset_info.json"
    known = json.loads(registry.read_text(encoding="utf-8")) if registry.is_file() else {}
    known[name] = {"file_name": f"{name}.jsonl", **entry}
    registry.write_text(json.dumps(known), encoding="utf-8")
    return folder


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A folder with a registered data set ``rows`` of 22 rows."""
    return write_dataset(tmp_path / "data", make_rows(22))


@pytest.fixture
def settings(tiny_model: Path, dataset: Path, tmp_path: Path) -> dict[str, Any]:
    """A configuration that trains the tiny model in fp32 for a few updates."""
    return {
        "model_name_or_path": str(tiny_model),
        "dataset": "rows",
        "dataset_dir": str(dataset),
        "output_dir": str(tmp_path / "run"),
        "compute_dtype": "fp32",
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "num_train_epochs": 1,
        "plot_loss": False,
    }


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """Write a configuration file and return its path."""

    def write(values: dict[str, Any]) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(json.dumps(values), encoding="utf-8")
        return path

    return write


@dataclass(frozen=True)
class Done:
    """What a command printed and how it ended."""

    returncode: int
    stdout: str
    stderr: str


def tunesmith(*arguments: object, check: bool = True, stdin: str = "") -> Done:
    """Run the command line in this process, as its entry point does."""
    from tunesmith.cli import main

    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["tunesmith", *map(str, arguments)])
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        status = 0
        try:
            main()
        except SystemExit as stop:
            status = int(stop.code or 0)
    done = Done(status, out.getvalue(), err.getvalue())
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def tunesmith_process(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the command line in a fresh process."""
    command = [sys.executable, "-m", "tunesmith", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done

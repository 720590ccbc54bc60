"""A finished adapter is an ordinary one: plain transformers and PEFT load it, in another process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tests.conftest import tunesmith
from tunesmith.config.load import load_config
from tunesmith.model.tokenizer import read_tokenizer
from tunesmith.serve.chat import load_tuned

PLAIN = """
import json, sys, torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
run, text = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(run)
model = AutoPeftModelForCausalLM.from_pretrained(run, dtype=torch.float32).eval()
assert "tunesmith" not in sys.modules
with torch.no_grad():
    print(json.dumps(model(**tokenizer(text, return_tensors="pt")).logits[0].tolist()))
"""


def test_same_logits_elsewhere(settings: dict[str, Any], write_config: Any) -> None:
    tunesmith("train", write_config(settings))
    run = Path(settings["output_dir"])
    text = "<|im_start|>user\nthe cat 你好<|im_end|>\n"
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", PLAIN, str(run), text], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "newly initialized" not in done.stderr
    config, _ = load_config(run / "config.yaml")
    model = load_tuned(run, config.model, read_tokenizer(run), torch.float32, torch.device("cpu"))
    with torch.no_grad():
        ours = model(**read_tokenizer(str(run))(text, return_tensors="pt")).logits[0]
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), ours, rtol=0, atol=0)

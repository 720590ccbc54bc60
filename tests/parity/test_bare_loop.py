"""Our runs against a loop written here from transformers and PEFT alone: same initialisation, same rows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

from tests.conftest import SHARED, make_rows, tunesmith
from tunesmith.train.runlog import read_log


def encode(tokenizer: Any, row: dict[str, str]) -> tuple[list[int], list[int]]:
    """Ids and labels of an alpaca row, prompt masked, the answer learned up to its end-of-turn token."""
    question = "\n".join(part for part in (row["instruction"], row["input"]) if part)
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
    prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, tokenize=True, return_dict=False)
    ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    labels = [-100] * len(prompt) + ids[len(prompt) :]
    last = max(i for i, token in enumerate(ids) if token == tokenizer.eos_token_id)
    labels[last + 1 :] = [-100] * (len(ids) - last - 1)
    return ids, labels


def bare_loop(
    folder: str, rows: list[dict[str, str]], batch: int, steps: int, rate: float, seed: int
) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step of a padded loop in float32."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=steps)
    encoded = [encode(tokenizer, row) for row in rows]
    starts = list(range(0, len(encoded), batch))
    history = []
    for step in range(steps):
        begin = starts[step % len(starts)]
        chosen = encoded[begin : begin + batch]
        longest = max(len(ids) for ids, _ in chosen)
        pad = [longest - len(ids) for ids, _ in chosen]
        inputs = torch.tensor([ids + [0] * p for (ids, _), p in zip(chosen, pad, strict=True)])
        labels = torch.tensor([lab + [-100] * p for (_, lab), p in zip(chosen, pad, strict=True)])
        mask = torch.tensor([[1] * len(ids) + [0] * p for (ids, _), p in zip(chosen, pad, strict=True)])
        loss = model(input_ids=inputs, attention_mask=mask, labels=labels).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        history.append((loss.item(), norm.item()))
    return history


def our_run(run: Path) -> list[tuple[float, float]]:
    return [(entry["loss"], entry["grad_norm"]) for entry in read_log(run) if "loss" in entry]


def assert_equal(ours: list[tuple[float, float]], theirs: list[tuple[float, float]]) -> None:
    assert len(ours) == len(theirs)
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True), 1):
        for value, reference, name in zip(mine, other, ("loss", "gradient norm"), strict=True):
            assert math.isclose(value, reference, rel_tol=1e-5), f"step {step}: {name} {value} against {reference}"


@pytest.mark.parametrize("attention", ["auto", "sdpa", "eager"])
def test_twenty_steps_on_the_tiny_model(settings: dict[str, Any], write_config: Any, tiny_model: Path, attention: str) -> None:
    settings.update(disable_shuffling=True, max_steps=20, learning_rate=1e-3, attn_implementation=attention)
    tunesmith("train", write_config(settings))
    theirs = bare_loop(str(tiny_model), make_rows(22), batch=4, steps=20, rate=1e-3, seed=42)
    ours = our_run(Path(settings["output_dir"]))
    assert ours[0][0] > ours[-1][0]
    assert_equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data folder, which is absent")
def test_twenty_steps_on_the_real_model_and_real_rows(tmp_path: Path) -> None:
    import json

    folder = tunesmith("fetch", "smollm2-135m").stdout.splitlines()[-1]
    rows = json.loads((SHARED / "data/demo/alpaca_en_demo.json").read_text(encoding="utf-8"))[:80]
    rows = [row for row in rows if len(row["output"]) < 900][:40]
    data = tmp_path / "data"
    data.mkdir()
    (data / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    (data / "dataset_info.json").write_text('{"rows": {"file_name": "rows.json"}}', encoding="utf-8")
    run = tmp_path / "run"
    tunesmith(
        "train", "examples/sft_lora.yaml", f"dataset_dir={data}", "dataset=rows", f"output_dir={run}", "max_steps=20",
        "compute_dtype=fp32", "disable_shuffling=true", "per_device_train_batch_size=2", "gradient_accumulation_steps=1",
        "learning_rate=1e-4", "val_size=0", "eval_strategy=no", "eval_steps=null", "eval_on_start=false",
        "load_best_model_at_end=false", "lr_scheduler_type=linear", "warmup_ratio=0", "lora_rank=8", "weight_decay=0",
    )  # fmt: skip
    assert_equal(our_run(run), bare_loop(folder, rows, batch=2, steps=20, rate=1e-4, seed=42))

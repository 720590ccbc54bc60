"""Value heads: what they score, and their file."""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.conftest import tunesmith
from tunesmith.config.arguments import FinetuningArguments
from tunesmith.data.collator import collate
from tunesmith.errors import ModelError
from tunesmith.model.adapter import (
    count_parameters,
    load_trainable,
    save_finished,
    save_trainable,
    set_head,
    trainable_parameters,
)
from tunesmith.model.files import VALUE_HEAD
from tunesmith.model.forward import FlatForward, segments_work
from tunesmith.model.heads import (
    BIAS,
    WEIGHT,
    ValueHead,
    head_width,
    load_value_head,
    row_scores,
    save_value_head,
    token_values,
)
from tunesmith.model.tuning import init_adapter
from tunesmith.types import Batch, Example, Source

WIDTH = 64
ROWS = ([5, 6, 7, 8, 9], [11], [12, 13, 2, 2])  # one token; and pad and end tokens at the end, which are real


def load(model: Path) -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    return loaded


def shaken(head: ValueHead, seed: int = 0) -> ValueHead:
    """With other weights, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return head


def batch_of(rows: Any = ROWS) -> Batch:
    ids = [np.array(row, np.int32) for row in rows]
    return collate([Example(row, row, Source("rows", "rows.jsonl", i + 1, i + 1)) for i, row in enumerate(ids)])


def test_scores_of_flat_padded_and_single_rows_are_equal(tiny_model: Path) -> None:
    model, head = load(tiny_model), shaken(ValueHead(WIDTH))
    with torch.no_grad():
        whole = [model(torch.tensor([row]), output_hidden_states=True).hidden_states[-1][0] for row in ROWS]
        alone = torch.stack([states[-1] @ head.summary.weight[0] + head.summary.bias[0] for states in whole])
        ahead = torch.cat([states[:-1] @ head.summary.weight[0] + head.summary.bias[0] for states in whole])
        padded = FlatForward(model, segments=False)
        torch.testing.assert_close(row_scores(padded, head, batch_of()), alone, rtol=0, atol=1e-5)
        torch.testing.assert_close(token_values(padded, head, batch_of()), ahead, rtol=0, atol=1e-5)
        assert segments_work(model) == (True, "")
        flat = FlatForward(model, segments=True)
        torch.testing.assert_close(row_scores(flat, head, batch_of()), alone, rtol=0, atol=1e-5)
        torch.testing.assert_close(token_values(flat, head, batch_of()), ahead, rtol=0, atol=1e-5)


def test_the_output_head_does_not_run(tiny_model: Path) -> None:
    model = load(tiny_model)

    def refuse(*_: Any) -> None:
        raise AssertionError("the output head ran")

    model.get_output_embeddings().register_forward_hook(refuse)
    assert row_scores(FlatForward(model, segments=False), ValueHead(head_width(model)), batch_of()).shape == (3,)


def test_a_new_head_scores_zero_and_learns(tiny_model: Path) -> None:
    model, head = load(tiny_model), ValueHead(WIDTH)
    scores = row_scores(FlatForward(model, segments=False), head, batch_of())
    assert scores.dtype == torch.float32
    assert scores.tolist() == [0, 0, 0]
    loss = -torch.nn.functional.logsigmoid(scores[0] - scores[1])
    assert math.isclose(loss.item(), math.log(2), rel_tol=1e-6)
    gradient = torch.autograd.grad(loss, head.summary.weight)[0]
    assert gradient.abs().max() > 1e-3


def test_a_head_is_float32_under_autocast() -> None:
    head, hidden = shaken(ValueHead(WIDTH)), torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        scores = head(hidden)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, torch.nn.functional.linear(hidden.float(), head.summary.weight, head.summary.bias)[:, 0])


@pytest.mark.parametrize("kind", ["lora", "freeze", "full"])
def test_the_head_goes_with_what_is_trained(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    def made() -> tuple[torch.nn.Module, ValueHead]:
        model = init_adapter(load(tiny_model), FinetuningArguments(finetuning_type=kind), str(tiny_model))  # type: ignore[arg-type]
        set_head(model, ValueHead(WIDTH))
        return model, shaken(ValueHead(WIDTH))

    model, trained = made()
    parameters = trainable_parameters(model)
    assert list(parameters)[-2:] == [WEIGHT, BIAS]
    plain = init_adapter(load(tiny_model), FinetuningArguments(finetuning_type=kind), str(tiny_model))  # type: ignore[arg-type]
    assert count_parameters(model) == tuple(number + WIDTH + 1 for number in count_parameters(plain))
    with torch.no_grad():
        for (_, mine), theirs in zip(list(parameters.items())[-2:], trained.parameters(), strict=True):
            mine.copy_(theirs)
        next(iter(parameters.values())).add_(1)
    for name, save in (("checkpoint", save_trainable), ("finished", save_finished)):
        folder = tmp_path / name
        folder.mkdir()
        save(model, folder)
        assert {key: tuple(tensor.shape) for key, tensor in load_file(folder / VALUE_HEAD).items()} == {
            WEIGHT: (1, 64),
            BIAS: (1,),
        }
        assert not any("v_head" in key for file in folder.glob("*model*.safetensors") for key in load_file(file))
    again, _ = made()
    load_trainable(again, tmp_path / "checkpoint")
    assert all(torch.equal(a, b) for a, b in zip(trainable_parameters(again).values(), parameters.values(), strict=True))
    (tmp_path / "checkpoint" / VALUE_HEAD).unlink()
    with pytest.raises(ModelError, match=r"value_head\.safetensors: no such file"):
        load_trainable(again, tmp_path / "checkpoint")


def weights(**changed: Any) -> dict[str, torch.Tensor]:
    state = {WEIGHT: torch.ones(1, WIDTH), BIAS: torch.ones(1), **changed}
    return {name: tensor for name, tensor in state.items() if tensor is not None}


def test_a_head_without_bias_or_in_half_precision_is_read(tmp_path: Path) -> None:
    save_file(weights(**{BIAS: None, WEIGHT: torch.full((1, WIDTH), 0.5, dtype=torch.bfloat16)}), tmp_path / VALUE_HEAD)
    head = load_value_head(tmp_path, WIDTH)
    assert head(torch.ones(1, WIDTH)).item() == 32


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({WEIGHT: torch.ones(1, 32)}, r"weight has shape \[1, 32\], expected \[1, 64\]"),
        ({WEIGHT: torch.ones(2, WIDTH)}, r"weight has shape \[2, 64\]"),
        ({BIAS: torch.tensor([math.nan])}, "bias holds numbers that are not finite"),
        ({WEIGHT: torch.full((1, WIDTH), math.inf)}, "weight holds numbers that are not finite"),
        ({WEIGHT: torch.ones(1, WIDTH, dtype=torch.int64)}, "stored as I64"),
        ({"score.weight": torch.ones(1, WIDTH)}, r"unexpected tensor score\.weight"),
        ({WEIGHT: None}, "holds no v_head.summary.weight"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, changed: Any, words: str) -> None:
    save_file(weights(**changed), tmp_path / VALUE_HEAD)
    with pytest.raises(ModelError, match=rf"value_head\.safetensors: .*{words}"):
        load_value_head(tmp_path, WIDTH)


def test_a_save_that_fails_leaves_the_head_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_value_head(shaken(ValueHead(WIDTH)), tmp_path)
    before = (tmp_path / VALUE_HEAD).read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        save_value_head(ValueHead(WIDTH), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {VALUE_HEAD: before}


# ---- M1


class Payload:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("how", ["pickle", "torch"])
@pytest.mark.parametrize("name", ["value_head.bin", "vhead.bin", VALUE_HEAD])
def test_m1_a_pickled_head(
    settings: dict[str, Any], write_config: Callable[..., Path], tmp_path: Path, name: str, how: str
) -> None:
    tunesmith("train", write_config({**settings, "max_steps": 1}))
    run, canary = Path(settings["output_dir"]), tmp_path / "CANARY"
    if how == "pickle":
        (run / name).write_bytes(pickle.dumps(Payload(canary)))
    else:
        torch.save(Payload(canary), run / name)
    with pytest.raises(ModelError, match=rf"{name}: .*pickle"):
        load_value_head(run, WIDTH)
    further = write_config({**settings, "checkpoint_dir": str(run), "output_dir": str(tmp_path / "on")})
    for command in (
        ("train", further),
        ("chat", run, "--prompt", "the"),
        ("export", run, "--output", tmp_path / "out"),
        ("verify", "merge", run),
    ):
        done = tunesmith(*command, check=False)
        assert done.returncode in (1, 2), command
        assert f"{name}: " in done.stderr, (command, done.stderr)
        assert "pickle" in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "on").exists()
    assert not (tmp_path / "out").exists()
    assert not canary.exists()

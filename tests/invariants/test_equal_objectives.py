"""What must not change the result: how a batch is split, laid out, recomputed, or read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaAttention

from tests.conftest import SHARED
from tunesmith.config.arguments import FinetuningArguments, ModelArguments
from tunesmith.config.load import load_config
from tunesmith.data.collator import collate
from tunesmith.data.loader import DataLoader
from tunesmith.data.prepare import load_examples
from tunesmith.data.report import DataReport
from tunesmith.losses.cross_entropy import token_nll
from tunesmith.model.adapter import trainable_parameters
from tunesmith.model.attention import SEGMENTS
from tunesmith.model.forward import FlatForward, segments_work
from tunesmith.model.load import load_base_model
from tunesmith.model.tokenizer import load_tokenizer
from tunesmith.model.tuning import init_adapter
from tunesmith.stages.run import build_trainer
from tunesmith.stages.run import run as run_stage
from tunesmith.train.progress import SilentReporter
from tunesmith.train.runlog import read_log
from tunesmith.types import IGNORE_INDEX, Example

ARCHITECTURES = ["stories260K" + suffix for suffix in ("", "-mistral", "-qwen2", "-phi3", "-gemma", "-mixtral")]


def history(settings: dict[str, Any], write_config: Any, name: str, **changes: Any) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each update of a run."""
    run = Path(settings["output_dir"]).parent / name
    config, _ = load_config(write_config({**settings, **changes, "output_dir": str(run)}))
    run_stage(config, SilentReporter())
    return [(e["loss"], e["grad_norm"]) for e in read_log(run) if "loss" in e]


def assert_close(one: list[tuple[float, float]], other: list[tuple[float, float]], tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=tolerance, atol=0)


def test_n2_splitting_a_batch_changes_nothing(settings: dict[str, Any], write_config: Any) -> None:
    """22 rows: the last window is short."""
    splits = [(8, 1), (4, 2), (1, 8)]
    runs = [
        history(
            settings, write_config, f"{b}x{a}", per_device_train_batch_size=b, gradient_accumulation_steps=a, num_train_epochs=2
        )
        for b, a in splits
    ]
    assert len(runs[0]) == 6
    for other in runs[1:]:
        assert_close(runs[0], other)


def test_n2_padded_equals_flat(settings: dict[str, Any], write_config: Any) -> None:
    flat = history(settings, write_config, "flat")
    assert_close(flat, history(settings, write_config, "sdpa", attn_implementation="sdpa"))
    assert_close(flat, history(settings, write_config, "eager", attn_implementation="eager"))


def test_packed_rows_give_the_losses_of_single_rows(settings: dict[str, Any], write_config: Any) -> None:
    """All rows in one update: however they are grouped, the objective is the same."""
    whole = {"disable_shuffling": True, "num_train_epochs": 3, "cutoff_len": 128}
    single = history(settings, write_config, "single", per_device_train_batch_size=22, **whole)
    packed = history(settings, write_config, "packed", per_device_train_batch_size=22, packing=True, **whole)
    micro = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 22}
    split = history(settings, write_config, "split", packing=True, **micro, **whole)
    assert len(single) == len(packed) == len(split) == 3
    assert_close(single, packed)
    assert_close(single, split)


def test_a_packed_run_resumes_where_it_was(settings: dict[str, Any], write_config: Any) -> None:
    packed = {"packing": True, "cutoff_len": 128, "per_device_train_batch_size": 1, "num_train_epochs": 2, "save_steps": 2}
    packed["lr_scheduler_type"] = "constant"  # so that the shorter first run has the same rates
    unbroken = history(settings, write_config, "unbroken", **packed)
    assert len(unbroken) > 6
    history(settings, write_config, "stopped", **packed, max_steps=5)
    resumed = history(settings, write_config, "stopped", **packed, resume_from_checkpoint="auto")
    assert resumed[5:] == unbroken[5:]


def test_gradient_checkpointing_recomputes_and_changes_nothing(
    settings: dict[str, Any], write_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [0]
    forward = LlamaAttention.forward

    def counted(self: LlamaAttention, *args: Any, **kwargs: Any) -> Any:
        calls[0] += self.training  # not the probes
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaAttention, "forward", counted)
    settings["lora_dropout"] = 0.1
    plain = history(settings, write_config, "plain")
    once, calls[0] = calls[0], 0
    assert_close(plain, history(settings, write_config, "recomputed", gradient_checkpointing=True))
    assert calls[0] > 1.5 * once


@pytest.mark.parametrize("quantised", [{}, {"quantization_bit": 4}, {"quantization_bit": 8}])
def test_n7_recomputing_reaches_every_adapter_and_leaves_the_base_alone(
    settings: dict[str, Any], write_config: Any, quantised: dict[str, Any]
) -> None:
    runs, weights = [], []
    for recompute in (False, True):
        values = {**settings, **quantised, "gradient_checkpointing": recompute, "max_steps": 3}
        trainer, _ = build_trainer(load_config(write_config(values))[0], SilentReporter())
        base = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
        losses = []
        for window in trainer.loader.windows(0):
            losses.append(trainer.training_step(window).loss_sum)
            if len(losses) == 3:
                break
        after = dict(trainer.model.named_parameters())
        assert all(torch.equal(value, after[name]) for name, value in base.items())
        changed = {name: p.detach().clone() for name, p in after.items() if "lora_B" in name}
        assert len(changed) == 14
        assert all(p.norm() > 1e-6 for p in changed.values())
        runs.append(losses)
        weights.append(changed)
    torch.testing.assert_close(torch.tensor(runs[0]), torch.tensor(runs[1]), rtol=1e-5, atol=0)
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-4, atol=1e-6)


def test_logging_interval_weighs_by_tokens(settings: dict[str, Any], write_config: Any) -> None:
    every = history(settings, write_config, "every", max_steps=4, learning_rate=1e-12)
    config, _ = load_config(write_config({**settings, "max_steps": 4}))
    counts = []
    examples, _ = load_examples(config, AutoTokenizer.from_pretrained(settings["model_name_or_path"]), DataReport())
    for window in list(DataLoader(examples, 4, seed=42).windows(0))[:4]:
        counts.append(sum(b.num_targets for b in window))
    rare = history(settings, write_config, "rare", max_steps=4, learning_rate=1e-12, logging_steps=4)
    expected = sum(loss * n for (loss, _), n in zip(every[1:], counts[1:], strict=True)) / sum(counts[1:])
    assert rare[-1][0] == pytest.approx(expected, rel=1e-6)


def test_full_training_too(settings: dict[str, Any], write_config: Any) -> None:
    full = {"finetuning_type": "full", "learning_rate": 1e-3}
    one = history(settings, write_config, "one", **full)
    assert one[-1][0] < one[0][0]
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    assert_close(one, history(settings, write_config, "two", **full, **split))


def _examples(settings: dict[str, Any], write_config: Any) -> Sequence[Example]:
    config, _ = load_config(write_config(settings))
    return load_examples(config, AutoTokenizer.from_pretrained(settings["model_name_or_path"]), DataReport())[0]


LAYOUTS = ["flat", "packed", "padded sdpa", "padded eager"]


def _losses(examples: Sequence[Example], settings: dict[str, Any], layout: str) -> dict[int, torch.Tensor]:
    """Row number -> negative log-likelihood of each supervised token, fp32; all rows computed together in that layout."""
    given = ModelArguments(
        model_name_or_path=settings["model_name_or_path"],
        attn_implementation=layout.split()[-1] if layout.startswith("padded") else "auto",
    )
    model = load_base_model(given, torch.float32, torch.device("cpu"), load_tokenizer(given))
    flat = not layout.startswith("padded")
    if flat:
        assert segments_work(model) == (True, "")
    forward = FlatForward(model, segments=flat)
    loader = DataLoader(examples, len(examples), capacity=160 if layout == "packed" else None)
    assert (len(loader.units) < len(examples)) == (layout == "packed")
    counts = {row.source.row: int((row.labels[1:] != IGNORE_INDEX).sum()) for row in examples}
    losses: dict[int, torch.Tensor] = {}
    for (batch,) in loader.windows(0):
        with torch.no_grad():
            values = token_nll(forward.logits(batch), batch.targets_S)
        rows = [source.row for source in batch.sources]
        losses |= dict(zip(rows, values.split([counts[row] for row in rows]), strict=True))
    assert losses.keys() == counts.keys()
    return losses


@pytest.mark.parametrize("layout", LAYOUTS)
def test_n3_rows_never_see_each_other_in_any_layout(settings: dict[str, Any], write_config: Any, layout: str) -> None:
    examples = list(_examples(settings, write_config)[:8])
    together = _losses(examples, settings, layout)
    for row in examples:
        alone = _losses([row], settings, "padded eager")[row.source.row]
        torch.testing.assert_close(together[row.source.row], alone, rtol=1e-5, atol=1e-5)
    first = examples[0]
    changed = Example(first.input_ids[::-1].copy(), first.labels, first.source)
    after = _losses([changed, *examples[1:]], settings, layout)
    assert (after[first.source.row] - together[first.source.row]).abs().max() > 1e-2
    for row in examples[1:]:
        torch.testing.assert_close(after[row.source.row], together[row.source.row], rtol=0, atol=1e-6)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data folder, which is absent")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_n7_every_architecture_trains_flat_as_it_does_padded(name: str) -> None:
    path = str(SHARED / "models" / name)
    gradients = {}
    generator = torch.Generator().manual_seed(1)
    lengths = (17, 5, 30)
    ids = torch.randint(3, 500, (sum(lengths),), generator=generator)
    cuts = torch.split(ids, lengths)
    for segments in (True, False):
        given = ModelArguments(model_name_or_path=path)
        model = load_base_model(given, torch.float32, torch.device("cpu"), load_tokenizer(given))
        if segments:
            assert segments_work(model) == (True, "")
            assert model.config._attn_implementation == SEGMENTS
        torch.manual_seed(0)
        tuned = init_adapter(model, FinetuningArguments(), path)
        for parameter_name, parameter in trainable_parameters(tuned).items():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.02)
        frozen = {n: p.detach().clone() for n, p in tuned.named_parameters() if not p.requires_grad}
        import numpy as np

        from tunesmith.types import Source

        rows = [
            Example(c.numpy().astype(np.int32), c.numpy().astype(np.int32), Source("d", "f", i, i)) for i, c in enumerate(cuts)
        ]
        batch = collate(rows)
        loss = token_nll(FlatForward(tuned, segments).logits(batch), batch.targets_S).sum()
        loss.backward()
        gradients[segments] = [loss.detach()] + [p.grad for p in trainable_parameters(tuned).values()]
        assert all(g.norm() > 1e-6 for g in gradients[segments])
        assert all(torch.equal(frozen[n], p) for n, p in tuned.named_parameters() if not p.requires_grad)
    for flat, padded in zip(gradients[True], gradients[False], strict=True):
        assert (flat - padded).norm() <= 1e-4 * padded.norm()

"""KTO against TRL's trainer: the same rows, the same mismatched answers, the same weights, fp32."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import write_dataset
from tests.e2e.test_kto import COLUMNS, feedback
from tests.parity.test_trl_preferences import padded
from tunesmith.config.load import load_config
from tunesmith.data.collator import collate
from tunesmith.data.kinds import Rows
from tunesmith.stages import reference
from tunesmith.stages.kto import FeedbackPeftTrainer
from tunesmith.stages.run import build_trainer
from tunesmith.train.progress import SilentReporter

trl = pytest.importorskip("trl", reason="TRL is not installed (it is in the extra dev)")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_loss_metrics_and_gradient(
    settings: dict[str, Any], write_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    """Both classes, and each of them alone, under a reference that is not the model, the reference point above 0."""
    from datasets import Dataset

    monkeypatch.setattr(reference, "cache_root", lambda: tmp_path / "cache")
    write_dataset(Path(settings["dataset_dir"]), feedback(12), "feedback", columns=COLUMNS)
    options = {"pref_beta": 0.3, "kto_chosen_weight": 1.25, "kto_rejected_weight": 0.75, "kto_loss": loss}
    settings.update(stage="kto", dataset="feedback", finetuning_type="full", learning_rate=1e-2, **options)
    built, _ = build_trainer(load_config(write_config(settings))[0], SilentReporter())
    assert isinstance(built, FeedbackPeftTrainer)
    rows = built.given.train_examples
    assert isinstance(rows, Rows)
    arguments = trl.KTOConfig(
        output_dir=str(tmp_path / "trl"), beta=0.3, loss_type=loss, desirable_weight=1.25, undesirable_weight=0.75,
        precompute_ref_log_probs=True, use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False,
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": "the", "completion": " cat", "label": good} for good in (True, False)])
    their_model = copy.deepcopy(built.model)
    their_model.set_attn_implementation("eager")
    theirs = trl.KTOTrainer(model=their_model, args=arguments, train_dataset=data, processing_class=built.given.tokenizer)
    torch.manual_seed(0)
    for own, other in zip(built.model.parameters(), their_model.parameters(), strict=True):
        own.data += 0.03 * torch.randn_like(own)
        other.data.copy_(own.data)
    chosen = [rows[index] for index in range(12)]
    moved = [replace(row, reference=tuple(value - 2 for value in row.reference)) for row in chosen]
    for part in (moved, [row for row in moved if row.desirable], [row for row in moved if not row.desirable]):
        batch = collate(part)
        inputs = padded([row.example for row in part]) | {"label": batch.desirable_P, "ref_logps": batch.reference_2P[0]}
        if loss == "kto":
            crossed = padded([row.mismatched for row in part])
            inputs |= {f"KL_{key}": value for key, value in crossed.items()} | {"ref_KL_logps": batch.reference_2P[1]}
            built._point = built._estimated([batch], "here")
            assert built._point > 0.1
        built.model.zero_grad(set_to_none=True)
        their_model.zero_grad(set_to_none=True)
        theirs._metrics["train"].clear()
        theirs.model.train()
        output = built.compute_loss(batch)
        ours = output.sum / output.count
        ours.backward()
        found = theirs._compute_loss(theirs.model, dict(inputs), return_outputs=False)
        found.backward()
        assert ours.item() == pytest.approx(found.item(), rel=1e-5, abs=1e-6)
        watched = built.watched(dict(output.metrics))
        assert watched
        for name, value in watched.items():
            assert value == pytest.approx(theirs._metrics["train"][name][-1], rel=1e-5, abs=1e-5), name
        for (key, mine), (_, other) in zip(built.model.named_parameters(), their_model.named_parameters(), strict=True):
            assert (mine.grad - other.grad).norm() <= 1e-5 * other.grad.norm().clamp(min=1e-4) + 1e-7, key

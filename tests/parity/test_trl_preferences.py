"""Preference losses against TRL's trainer: the same rows, the same weights, fp32."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import write_dataset
from tests.e2e.test_reward_model import COLUMNS, pairs
from tunesmith.config.load import load_config
from tunesmith.data.collator import collate
from tunesmith.data.kinds import Rows
from tunesmith.stages import reference
from tunesmith.stages.run import build_trainer
from tunesmith.train.progress import SilentReporter

trl = pytest.importorskip("trl", reason="TRL is not installed (it is in the extra dev)")

LOSSES = {
    "sigmoid": {}, "sigmoid_norm": {}, "hinge": {}, "ipo": {}, "robust": {"dpo_label_smoothing": 0.1},
    "exo_pair": {"dpo_label_smoothing": 0.1}, "nca_pair": {}, "bco_pair": {}, "sppo_hard": {}, "apo_zero": {}, "apo_down": {},
    "discopop": {}, "aot": {}, "aot_unpaired": {},
}  # fmt: skip


@pytest.mark.timeout(300)
@pytest.mark.parametrize("ld_alpha", [None, 0.3])
def test_loss_and_gradient_of_every_loss(
    settings: dict[str, Any], write_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ld_alpha: float | None
) -> None:
    from datasets import Dataset

    monkeypatch.setattr(reference, "cache_root", lambda: tmp_path / "cache")
    write_dataset(Path(settings["dataset_dir"]), pairs(8), "pairs", ranking=True, columns=COLUMNS)
    settings.update(stage="dpo", dataset="pairs", finetuning_type="full", pref_beta=0.7, learning_rate=1e-2, ld_alpha=ld_alpha)
    built, _ = build_trainer(load_config(write_config(settings))[0], SilentReporter())
    built.training_step(next(built.loader.windows(0)))  # away from where every log-ratio is 0
    rows = built.given.train_examples
    assert isinstance(rows, Rows)
    batch = collate(rows[:6])
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"), beta=0.7, ld_alpha=ld_alpha, precompute_ref_log_probs=True, use_cpu=True, bf16=False,
        report_to="none", gradient_checkpointing=False,
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": "the", "chosen": " cat", "rejected": " dog"}] * 2)
    their_model = copy.deepcopy(built.model)
    their_model.set_attn_implementation("eager")
    theirs = trl.DPOTrainer(model=their_model, args=arguments, train_dataset=data, processing_class=built.given.tokenizer)
    inputs = padded([side for pair in ("chosen", "rejected") for side in [getattr(row, pair) for row in rows[:6]]])
    assert batch.reference_2P is not None
    inputs |= {"ref_chosen_logps": batch.reference_2P[0], "ref_rejected_logps": batch.reference_2P[1]}
    for name, options in LOSSES.items():
        values = {**settings, **options, "pref_loss": name}
        tuning = load_config(write_config(values))[0].finetuning
        object.__setattr__(built.given, "finetuning", tuning)
        theirs.loss_types, theirs.loss_weights, theirs.label_smoothing = [name], [1.0], tuning.dpo_label_smoothing
        built.model.zero_grad(set_to_none=True)
        their_model.zero_grad(set_to_none=True)
        output = built.compute_loss(batch)
        ours = output.sum / output.count
        ours.backward()
        loss = theirs._compute_loss(theirs.model, dict(inputs), return_outputs=False)
        loss.backward()
        assert ours.item() == pytest.approx(loss.item(), rel=1e-5, abs=1e-6), name
        for (key, mine), (_, other) in zip(built.model.named_parameters(), their_model.named_parameters(), strict=True):
            scale = other.grad.norm().clamp(min=1e-4)
            assert (mine.grad - other.grad).norm() <= 1e-5 * scale + 1e-7, (name, key)


def padded(rows: list[Any]) -> dict[str, torch.Tensor]:
    longest = max(len(row) for row in rows)
    ids, mask, learned = (torch.zeros(len(rows), longest, dtype=torch.long) for _ in range(3))
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.from_numpy(row.input_ids)
        mask[number, : len(row)] = 1
        learned[number, : len(row)] = torch.from_numpy(row.labels != -100)
    return {"input_ids": ids, "attention_mask": mask, "completion_mask": learned}

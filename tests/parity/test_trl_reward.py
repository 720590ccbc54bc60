"""Reward models against TRL's trainer: the same pairs and margins, the same weights, fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tests.conftest import write_dataset
from tests.e2e.test_reward_model import COLUMNS, pairs
from tests.parity.test_trl_preferences import padded
from tunesmith.config.load import load_config
from tunesmith.data.collator import collate
from tunesmith.data.kinds import Rows
from tunesmith.model.adapter import head_of
from tunesmith.stages.run import build_trainer
from tunesmith.train.progress import SilentReporter

trl = pytest.importorskip("trl", reason="TRL is not installed (it is in the extra dev)")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("with_margins", [False, True])
def test_loss_metrics_and_gradient(settings: dict[str, Any], write_config: Any, tmp_path: Path, with_margins: bool) -> None:
    from datasets import Dataset

    columns = {**COLUMNS, "margin": "better_by"} if with_margins else COLUMNS
    rows = [{**row, "better_by": i / 4} for i, row in enumerate(pairs(6))]
    write_dataset(Path(settings["dataset_dir"]), rows, "graded", ranking=True, columns=columns)
    settings.update(stage="rm", dataset="graded", finetuning_type="full", reward_centering=0.05)
    built, _ = build_trainer(load_config(write_config(settings))[0], SilentReporter())
    head, examples = head_of(built.model), built.given.train_examples
    assert head is not None and isinstance(examples, Rows)
    torch.manual_seed(0)
    torch.nn.init.normal_(head.summary.weight, std=0.3)
    their_model = AutoModelForSequenceClassification.from_pretrained(
        settings["model_name_or_path"], num_labels=1, attn_implementation="eager", dtype=torch.float32
    )
    their_model.load_state_dict({**built.model.state_dict(), "score.weight": head.summary.weight.detach()}, strict=False)
    arguments = trl.RewardConfig(
        output_dir=str(tmp_path / "trl"), center_rewards_coefficient=0.05, use_cpu=True, bf16=False, report_to="none",
        gradient_checkpointing=False,
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": "the", "chosen": " cat", "rejected": " dog"}] * 2)
    theirs = trl.RewardTrainer(model=their_model, args=arguments, train_dataset=data, processing_class=built.given.tokenizer)
    batch = collate(examples[:6])
    inputs = padded([getattr(row, side) for side in ("chosen", "rejected") for row in examples[:6]])
    inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    if with_margins:
        inputs["margin"] = torch.tensor([row.margin for row in examples[:6]])
        assert inputs["margin"].tolist() == [0, 0.25, 0.5, 0.75, 1, 1.25]
    output = built.compute_loss(batch)
    ours = output.sum / output.count
    ours.backward()
    theirs.model.train()
    loss = theirs.compute_loss(theirs.model, dict(inputs))
    loss.backward()
    assert ours.item() == pytest.approx(loss.item(), rel=1e-5)
    watched = built.watched(dict(output.metrics))
    for mine, other in (("accuracy", "accuracy"), ("rewards/margins", "margin")):
        assert watched[mine] == pytest.approx(theirs._metrics["train"][other][-1], rel=1e-5, abs=1e-5)
    gradients = {name: p.grad for name, p in their_model.named_parameters()}
    torch.testing.assert_close(head.summary.weight.grad, gradients.pop("score.weight"), rtol=1e-4, atol=1e-6)
    mine = {name: p.grad for name, p in built.model.named_parameters() if not name.startswith("lm_head")}
    assert len(gradients) > 10
    for name, other in gradients.items():
        assert (mine[name] - other).norm() <= 1e-5 * other.norm().clamp(min=1e-4) + 1e-7, name

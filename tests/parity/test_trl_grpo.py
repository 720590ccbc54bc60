"""GRPO's losses against TRL's trainer: the same rows, the same weights, fp32."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from tests.parity.test_policy_update import Case, Padded, flat
from tunesmith.losses.policy import (
    clipped_policy_loss,
    clipped_tokens,
    importance_ratio,
    kl_estimate,
    token_weights,
)

trl = pytest.importorskip("trl", reason="TRL is not installed (it is in the extra dev)")

AGGREGATION = {"grpo": "sequence_mean", "dapo": "token_mean", "bnpo": "token_mean", "dr_grpo": "constant"}
LENGTHS = [(3, 6), (5, 1), (2, 9), (4, 4), (6, 2), (3, 7)]
LOW, HIGH, BETA, ENTROPY, LONGEST = 0.15, 0.25, 0.1, 0.05, 12


class Whole(Case):
    """All weights are trained, and there is no value head."""

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return dict(self.model.named_parameters())


class Plain:
    """A model where ``flat`` looks for an adapted one."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.named_parameters = model.named_parameters
        self.get_base_model = lambda: model


@pytest.mark.parametrize(("level", "corrected"), [("token", True), ("token", False), ("sequence", False)])
def test_loss_and_gradient_of_every_loss(tiny_model: Path, tmp_path: Path, level: Any, corrected: bool) -> None:
    from datasets import Dataset

    torch.manual_seed(0)
    model = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path / "trl"), beta=BETA, epsilon=LOW, epsilon_high=HIGH, entropy_coef=ENTROPY, max_completion_length=LONGEST,
        importance_sampling_level=level, loss_type="grpo", num_generations=2, per_device_train_batch_size=6, use_cpu=True, bf16=False,
        report_to="none", gradient_checkpointing=False, temperature=1.0, use_bias_correction_kl=corrected,
    )  # fmt: skip
    theirs = trl.GRPOTrainer(
        model=copy.deepcopy(model), reward_funcs=lambda completions, **_: [0.0] * len(completions), args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "the"}] * 6), processing_class=AutoTokenizer.from_pretrained(tiny_model),
    )  # fmt: skip
    theirs.current_gradient_accumulation_steps = 1
    theirs.model.train()
    vocabulary = model.config.vocab_size
    rows = [(torch.randint(vocabulary, (prompt,)), torch.randint(vocabulary, (answer,))) for prompt, answer in LENGTHS]
    case = Whole(Plain(model), torch.nn.Linear(model.config.hidden_size, 1), rows, [], [], [], torch.empty(6), torch.empty(6))
    advantages = torch.randn(len(rows))
    with torch.no_grad():
        logp, *_ = flat(case)
    old, reference = (logp + torch.randn_like(logp) * 0.5 for _ in range(2))
    answers = [answer for _, answer in LENGTHS]
    lists = list(old.split(answers)), list(reference.split(answers)), list(old.split(answers))
    padded = Padded(Case(model, case.head, rows, *lists, case.scores, case.groups), 2)
    longest = padded.mask.shape[1]
    inputs = {
        "prompt_ids": padded.ids[:, :-longest], "prompt_mask": padded.real[:, :-longest],
        "completion_ids": padded.ids[:, -longest:], "completion_mask": padded.real[:, -longest:],
        "advantages": advantages, "old_per_token_logps": padded.old, "ref_per_token_logps": padded.reference,
        "num_items_in_batch": padded.mask.sum(),
    }  # fmt: skip
    for name, aggregation in AGGREGATION.items():
        logp, entropy, _, row = flat(case)
        weights, total = token_weights(row, len(rows), aggregation, LONGEST)  # type: ignore[arg-type]
        losses = clipped_policy_loss(logp, old, advantages[row], row, LOW, HIGH, level)
        kl = kl_estimate(logp, reference, "k3")
        losses = losses + BETA * (kl * importance_ratio(logp, old, row, level) if corrected else kl)
        ours = (weights * losses).sum() / total - ENTROPY * entropy.mean()
        mine = case.gradients(ours)
        theirs.loss_type = name
        theirs.model.zero_grad(set_to_none=True)
        theirs._metrics["train"].clear()
        loss = theirs._compute_loss(theirs.model, dict(inputs))
        loss.backward()
        assert ours.item() == pytest.approx(loss.item(), rel=1e-5, abs=1e-6), name
        for key, other in theirs.model.named_parameters():
            assert (mine[key] - other.grad).norm() <= 1e-5 * other.grad.norm() + 1e-6, (name, key)
        assert theirs._metrics["train"]["entropy"] == pytest.approx([entropy.mean().item()], rel=1e-5)
    clipped = clipped_tokens(logp, old, advantages[row], row, LOW, HIGH, level).float()
    share = clipped.mean() if level == "token" else torch.stack([part.mean() for part in clipped.split(answers)]).mean()
    assert share > 0 and theirs._metrics["train"]["clip_ratio/region_mean"] == pytest.approx([share.item()], rel=1e-5)

"""The trainers of stages ppo and grpo, from sampled answers to gradients, against the padded references of the other module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.test_policy import answering, built  # noqa: F401 (a fixture)
from tests.parity import test_policy_update as papers
from tests.parity.test_policy_update import Case, Padded, their_grpo, their_ppo
from tunesmith.model.adapter import head_of, unwrap
from tunesmith.stages.policy import PolicyPeftTrainer
from tunesmith.types import Batch

SETTINGS = {
    "per_device_train_batch_size": 4, "ppo_buffer_size": 2, "num_generations": 4, "kl_coef": papers.KL, "cliprange": papers.CLIP,
    "cliprange_high": papers.CLIP_HIGH, "max_new_tokens": 12, "max_grad_norm": 0.0,
}  # fmt: skip


def collected(trainer: PolicyPeftTrainer, batches: list[Batch]) -> Case:
    """The rows of a rollout, with what the trainer noted of them and their scores made anew."""
    head = head_of(trainer.model)
    rows, lists = [], [[], [], []]  # type: ignore[var-annotated]
    for batch in batches:
        assert batch.policy is not None
        reference = trainer.given.actors.reference(batch, 1.0)  # type: ignore[union-attr]
        counts = batch.policy.row_S.bincount().tolist()
        old = batch.policy.old_S
        values = batch.policy.values_S if head is not None else torch.zeros_like(old)  # type: ignore[arg-type]
        for these, those in zip(lists, (old, reference, values), strict=True):
            these += those.split(counts)  # type: ignore[union-attr]
        for ids, answer in zip(batch.input_ids_T.split(list(batch.lengths)), counts, strict=True):
            rows.append((ids[:-answer], ids[-answer:]))
    texts = [trainer.given.tokenizer.decode(answer, skip_special_tokens=True) for _, answer in rows]
    scores = torch.tensor([sum(c.isascii() and c.isalpha() for c in text) / max(len(text), 1) for text in texts])
    groups = torch.arange(len(rows)) // 4
    return Case(trainer.model, None if head is None else head.summary, rows, *lists, scores, groups)  # type: ignore[arg-type]


def compare(trainer: PolicyPeftTrainer, batches: list[Batch], expected: torch.Tensor) -> None:
    """Loss and gradients of all answers, by the trainer in micro-batches and by the reference."""
    outputs = [trainer.compute_loss(batch) for batch in batches]
    loss = sum(output.sum for output in outputs) / sum(output.count for output in outputs)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    own = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    mine, theirs = torch.autograd.grad(loss, own), torch.autograd.grad(expected, own)  # type: ignore[arg-type]
    assert sum(gradient.norm() for gradient in theirs) > 1e-2
    for one, other in zip(mine, theirs, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm() + 1e-6


@contextmanager
def padding(trainer: PolicyPeftTrainer) -> Iterator[None]:
    """The library's own attention, which the reference uses."""
    base = unwrap(trainer.model)
    before = base.config._attn_implementation
    base.set_attn_implementation("eager")
    yield
    base.set_attn_implementation(before)


def moved(trainer: PolicyPeftTrainer) -> None:
    """Another policy than the one that answered."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (p for group in trainer.optimizer.param_groups for p in group["params"]):
            parameter += 0.03 * torch.randn(parameter.shape, generator=generator)


def test_ppo(answering: dict[str, Any], write_config: Any) -> None:  # noqa: F811
    options = {
        "gamma": papers.GAMMA, "gae_lambda": papers.LAM, "cliprange_value": papers.CLIP_VALUE, "vf_coef": papers.VALUE,
        "entropy_coef": papers.ENTROPY, "whiten_rewards": True, "score_norm": False, "kl_estimator": "k3",
    }  # fmt: skip
    trainer = built(answering, write_config, **SETTINGS, **options)
    moved(trainer)
    batches = trainer.collect(0, 0, range(2))
    case = collected(trainer, batches)
    with padding(trainer), torch.no_grad():
        padded = Padded(case, 2)
        torch.testing.assert_close(torch.cat(case.old), padded.flat(padded.logp), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.cat(case.values), padded.flat(case.head(padded.state)[..., 0]), rtol=1e-5, atol=1e-5)
        with trainer.model.disable_adapter():  # type: ignore[operator]
            padded = Padded(case, 0)
        torch.testing.assert_close(torch.cat(case.reference), padded.flat(padded.logp), rtol=1e-5, atol=1e-5)
    moved(trainer)
    with padding(trainer):
        theirs = their_ppo(case, "k3", 3)
    ours = torch.cat([batch.policy.advantages_S for batch in batches])  # type: ignore[union-attr]
    torch.testing.assert_close(ours, theirs["advantages"], rtol=1e-4, atol=1e-5)
    compare(trainer, batches, theirs["loss"])


@pytest.mark.parametrize(("loss", "aggregation"), [("grpo", "sequence_mean"), ("dapo", "token_mean"), ("dr_grpo", "constant")])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_grpo(answering: dict[str, Any], write_config: Any, loss: str, aggregation: str, level: str) -> None:  # noqa: F811
    options = {"stage": "grpo", "grpo_loss": loss, "importance_level": level, "ppo_epochs": 2}
    trainer = built(answering, write_config, **SETTINGS, **options)
    moved(trainer)
    batches = trainer.collect(0, 0, range(2))
    case = collected(trainer, batches)
    moved(trainer)
    with padding(trainer):
        theirs = their_grpo(case, aggregation, level, 1)
    compare(trainer, batches, theirs["loss"])


def test_padding_and_early_ends_change_nothing(answering: dict[str, Any], write_config: Any, tmp_path: Path) -> None:  # noqa: F811
    """Answers of very different lengths: each counts its own tokens alone."""
    trainer = built(answering, write_config, **{**SETTINGS, "max_new_tokens": 40}, response_lengths=[1, 40], score_norm=False)
    case = collected(trainer, trainer.collect(0, 0, range(2)))
    lengths = {len(answer) for _, answer in case.rows}
    assert len(lengths) > 1
    with padding(trainer), torch.no_grad():
        for extra in (0, 9):
            padded = Padded(case, extra)
            torch.testing.assert_close(torch.cat(case.old), padded.flat(padded.logp), rtol=1e-5, atol=1e-5)

"""A whole update of PPO and one of GRPO against padded references written from the papers, in float32.

Ours goes from flat rows, one forward pass for each, through ``losses/``. The reference pads all rows to one length, makes all
logits, and has loops where the papers have recursions; it uses nothing of the package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from tunesmith.losses.advantage import gae, group_advantages, token_rewards, whiten
from tunesmith.losses.policy import (
    approx_kl,
    clipped_policy_loss,
    clipped_tokens,
    clipped_value_loss,
    kl_estimate,
    token_weights,
)
from tunesmith.losses.token_logprobs import token_logprobs_and_entropy

LENGTHS = [(3, 6), (5, 1), (2, 9), (4, 4), (6, 2), (3, 7), (2, 3), (5, 5)]  # prompt, answer
GAMMA, LAM, CLIP, CLIP_HIGH, CLIP_VALUE, KL, VALUE, ENTROPY = 0.98, 0.9, 0.15, 0.25, 0.1, 0.2, 0.3, 0.05


@dataclass(frozen=True)
class Case:
    """Rows of tokens, what was collected of them, and the model that is trained."""

    model: Any
    head: torch.nn.Linear
    rows: list[tuple[torch.Tensor, torch.Tensor]]
    old: list[torch.Tensor]
    reference: list[torch.Tensor]
    values: list[torch.Tensor]
    scores: torch.Tensor
    groups: torch.Tensor

    def picked(self, order: list[int]) -> Case:
        """Some of the rows, in another order."""
        lists = ([these[i] for i in order] for these in (self.rows, self.old, self.reference, self.values))
        return Case(self.model, self.head, *lists, self.scores[order], self.groups[order])

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        return trained | {f"head.{name}": p for name, p in self.head.named_parameters()}

    def gradients(self, loss: torch.Tensor) -> dict[str, torch.Tensor]:
        """Of all parameters; 0 where the loss does not reach."""
        parameters = self.parameters
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        zeros = (torch.zeros_like(p) for p in parameters.values())
        return {name: z if g is None else g for name, g, z in zip(parameters, found, zeros, strict=True)}


@pytest.fixture(scope="module")
def case() -> Case:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, initializer_range=0.2, max_position_embeddings=64))
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    model.eval()
    head = torch.nn.Linear(32, 1)
    rows = [(torch.randint(40, (prompt,)), torch.randint(40, (answer,))) for prompt, answer in LENGTHS]
    bare = Case(model, head, rows, [], [], [], torch.randn(len(rows)), torch.tensor([0, 1, 0, 1, 0, 1, 0, 1]))
    with torch.no_grad():
        logps, _, values, _ = flat(bare)
        with model.disable_adapter():
            reference, *_ = flat(bare)
    answers = [answer for _, answer in LENGTHS]
    old, values = logps + torch.randn_like(logps) * 0.2, values + torch.randn_like(values) * 0.2
    lists = [list(these.split(answers)) for these in (old, reference, values)]
    return Case(model, head, rows, *lists, bare.scores, bare.groups)


# ---- ours


def flat(case: Case) -> tuple[torch.Tensor, ...]:
    """Log-probabilities, entropies and values of all answers' tokens, end to end, and the row of each."""
    states = []
    for prompt, answer in case.rows:
        ids = torch.cat([prompt, answer])[None]
        hidden = case.model.get_base_model().model(ids).last_hidden_state[0]
        states.append(hidden[len(prompt) - 1 : -1])
    hidden_SH = torch.cat(states)
    weight = case.model.get_base_model().lm_head.weight
    targets = torch.cat([answer for _, answer in case.rows])
    logp, entropy = token_logprobs_and_entropy(hidden_SH, weight, targets, entropy_grad=True)
    rows = torch.arange(len(case.rows)).repeat_interleave(torch.tensor([len(answer) for _, answer in case.rows]))
    return logp, entropy, case.head(hidden_SH)[:, 0], rows


def our_ppo(case: Case, kind: str) -> dict[str, torch.Tensor]:
    logp, entropy, values, rows = flat(case)
    old, reference, old_values = (torch.cat(these) for these in (case.old, case.reference, case.values))
    kl = kl_estimate(old, reference, kind)  # type: ignore[arg-type]
    rewards = whiten(token_rewards(case.scores, kl, rows, KL), shift_mean=False)
    advantages, returns = gae(rewards, old_values, rows, GAMMA, LAM)
    advantages = whiten(advantages)
    weights, total = token_weights(rows, len(case.rows), "token_mean")
    policy = clipped_policy_loss(logp, old, advantages, rows, CLIP, CLIP_HIGH)
    value = clipped_value_loss(values, old_values, returns, CLIP_VALUE)
    parts = {"policy": policy, "value": value, "entropy": entropy, "moved": approx_kl(logp, old)}
    means = {name: (weights * part).sum() / total for name, part in parts.items()}
    means["clipped"] = clipped_tokens(logp, old, advantages, rows, CLIP, CLIP_HIGH).float().mean()
    loss = means["policy"] + VALUE * means["value"] - ENTROPY * means["entropy"]
    return means | {"loss": loss, "kl": kl, "rewards": rewards, "advantages": advantages, "returns": returns}


def our_grpo(case: Case, aggregation: str, level: str) -> dict[str, torch.Tensor]:
    logp, _, _, rows = flat(case)
    advantages = group_advantages(case.scores, case.groups)
    weights, total = token_weights(rows, len(case.rows), aggregation, 12.0)  # type: ignore[arg-type]
    losses = clipped_policy_loss(logp, torch.cat(case.old), advantages[rows], rows, CLIP, CLIP_HIGH, level)  # type: ignore[arg-type]
    losses = losses + KL * kl_estimate(logp, torch.cat(case.reference), "k3")
    return {"loss": (weights * losses).sum() / total, "advantages": advantages}


# ---- the reference


class Padded:
    """Rows of one length: prompts padded on the left, answers on the right."""

    def __init__(self, case: Case, extra: int) -> None:
        prompts, answers = (max(len(row[i]) for row in case.rows) + extra for i in (0, 1))
        self.ids = torch.zeros(len(case.rows), prompts + answers, dtype=torch.long)
        self.real = torch.zeros_like(self.ids)
        self.mask = torch.zeros(len(case.rows), answers)
        self.old, self.reference, self.values = (torch.full((len(case.rows), answers), 7.0) for _ in range(3))
        for i, (prompt, answer) in enumerate(case.rows):
            self.ids[i, prompts - len(prompt) : prompts + len(answer)] = torch.cat([prompt, answer])
            self.real[i, prompts - len(prompt) : prompts + len(answer)] = 1
            self.mask[i, : len(answer)] = 1
            for grid, lists in ((self.old, case.old), (self.reference, case.reference), (self.values, case.values)):
                grid[i, : len(answer)] = lists[i]
        places = (self.real.cumsum(1) - 1).clamp(min=0)
        output = case.model(self.ids, attention_mask=self.real, position_ids=places, output_hidden_states=True)
        self.distribution = output.logits[:, prompts - 1 : -1].log_softmax(-1)
        self.logp = self.distribution.gather(2, self.ids[:, prompts:, None])[..., 0]
        self.state = output.hidden_states[-1][:, prompts - 1 : -1]

    def mean(self, grid: torch.Tensor) -> torch.Tensor:
        return (grid * self.mask).sum() / self.mask.sum()

    def flat(self, grid: torch.Tensor) -> torch.Tensor:
        return grid[self.mask.bool()]


def their_ppo(case: Case, kind: str, extra: int) -> dict[str, torch.Tensor]:
    padded = Padded(case, extra)
    mask = padded.mask.double().numpy()
    old, reference, values = (grid.double().numpy() for grid in (padded.old, padded.reference, padded.values))
    log_quotient = old - reference
    kl = {"k1": log_quotient, "k2": log_quotient**2 / 2, "k3": np.exp(-log_quotient) - 1 + log_quotient}[kind] * mask
    rewards = -KL * kl
    for i, (_, answer) in enumerate(case.rows):
        rewards[i, len(answer) - 1] += case.scores[i].item()

    def standard(grid: np.ndarray) -> tuple[np.ndarray, float]:
        real = grid[mask > 0]
        return (grid - real.mean()) / np.sqrt(real.var(ddof=1) + 1e-8) * mask, real.mean()

    whitened, mean = standard(rewards)
    rewards = (whitened + mean) * mask
    advantages = np.zeros_like(rewards)
    for i, (_, answer) in enumerate(case.rows):
        for t in range(len(answer)):  # the sum of equation 16, term by term
            for later in range(t, len(answer)):
                after = values[i, later + 1] if later + 1 < len(answer) else 0.0
                error = rewards[i, later] + GAMMA * after - values[i, later]
                advantages[i, t] += (GAMMA * LAM) ** (later - t) * error
    returns = torch.tensor(advantages + values).float()
    advantages, _ = standard(advantages)
    fixed = torch.tensor(advantages).float()

    ratio = (padded.logp - padded.old * padded.mask).exp()
    inside = (ratio >= 1 - CLIP) & (ratio <= 1 + CLIP_HIGH)
    bounded = torch.where(inside, ratio, torch.where(ratio < 1, 1 - CLIP, 1 + CLIP_HIGH))
    ignored = bounded * fixed < ratio * fixed
    policy = -padded.mean(torch.where(ignored, bounded * fixed, ratio * fixed))
    now = case.head(padded.state)[..., 0]
    near = torch.minimum(torch.maximum(now, padded.values - CLIP_VALUE), padded.values + CLIP_VALUE)
    value = 0.5 * padded.mean(torch.maximum((now - returns) ** 2, (near - returns) ** 2))
    entropy = -padded.mean((padded.distribution.exp() * padded.distribution).sum(-1))
    return {
        "policy": policy,
        "value": value,
        "entropy": entropy,
        "moved": padded.mean(ratio - 1 - ratio.log()),
        "clipped": padded.mean((ignored & ~inside).float()),
        "loss": policy + VALUE * value - ENTROPY * entropy,
        "kl": padded.flat(torch.tensor(kl)).float(),
        "rewards": padded.flat(torch.tensor(rewards)).float(),
        "advantages": padded.flat(fixed),
        "returns": padded.flat(returns),
    }


def their_grpo(case: Case, aggregation: str, level: str, extra: int) -> dict[str, torch.Tensor]:
    padded = Padded(case, extra)
    advantages = torch.zeros(len(case.rows))
    for group in case.groups.unique():
        members = case.scores[case.groups == group]
        advantages[case.groups == group] = (members - members.mean()) / (members.std() + 1e-4)
    lengths = padded.mask.sum(1, keepdim=True)
    quotient = (padded.logp - padded.old) * padded.mask
    ratio = quotient.exp() if level == "token" else (quotient.sum(1, keepdim=True) / lengths).exp().expand_as(quotient)
    gains = torch.minimum(ratio * advantages[:, None], ratio.clamp(1 - CLIP, 1 + CLIP_HIGH) * advantages[:, None])
    away = (padded.reference - padded.logp) * padded.mask
    losses = (KL * (away.exp() - away - 1) - gains) * padded.mask
    total = {
        "sequence_mean": (losses.sum(1) / lengths[:, 0]).mean(),
        "token_mean": losses.sum() / padded.mask.sum(),
        "constant": losses.sum() / 12 / len(case.rows),
    }
    return {"loss": total[aggregation], "advantages": advantages}


# ---- the comparison


def compare(case: Case, ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    mine, others = case.gradients(ours["loss"]), case.gradients(theirs["loss"])
    assert any(gradient.norm() > 0.01 for gradient in others.values())
    for name, expected in others.items():
        assert (mine[name] - expected).norm() <= 1e-5 * expected.norm() + 1e-6, name


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("extra", [0, 5])
def test_an_update_of_ppo(case: Case, kind: str, extra: int) -> None:
    ours = our_ppo(case, kind)
    assert 0.05 < ours["clipped"] < 0.95
    compare(case, ours, their_ppo(case, kind, extra))


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "constant"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_an_update_of_grpo(case: Case, aggregation: str, level: str) -> None:
    compare(case, our_grpo(case, aggregation, level), their_grpo(case, aggregation, level, 3))


def test_the_order_of_rows_changes_nothing(case: Case) -> None:
    order = [5, 2, 7, 0, 1, 6, 4, 3]
    other = case.picked(order)
    for one, two in (
        (our_ppo(case, "k3"), our_ppo(other, "k3")),
        (our_grpo(case, "token_mean", "sequence"), our_grpo(other, "token_mean", "sequence")),
    ):
        mine, others = case.gradients(one["loss"]), case.gradients(two["loss"])
        torch.testing.assert_close(one["loss"], two["loss"], rtol=1e-6, atol=1e-6)
        for name, gradient in mine.items():
            assert (others[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-6, name


def test_before_the_first_step_nothing_has_moved(case: Case) -> None:
    with torch.no_grad():
        logp, entropy, _, rows = flat(case)
    advantages = torch.randn(len(logp))
    assert not kl_estimate(logp, logp, "k3").any() and not approx_kl(logp, logp).any() and (entropy >= 0).all()
    for level in ("token", "sequence"):
        assert torch.equal(clipped_policy_loss(logp, logp, advantages, rows, 0.2, 0.2, level), -advantages)  # type: ignore[arg-type]
        assert not clipped_tokens(logp, logp, advantages, rows, 0.2, 0.2, level).any()  # type: ignore[arg-type]

"""PPO with four models in memory, padded, from transformers and PEFT alone. Shares no code with the package.

As TRL's trainer did it while there was one, and as textbooks write it: arXiv 2203.02155 with arXiv 1707.06347 and 1506.02438.
Policy and critic have LoRA on trunks of their own, reference and reward model are whole. Answers to all prompts of a rollout
are generated in one batch until the longest is done; prompts are padded on the left and answers on the right to one width for
the rollout, every model computes all of it, and log-probabilities come from all logits.

``B`` rows, ``L`` width, ``A`` width of the answers, ``V`` vocabulary.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from benchmarks.contenders.bare import DTYPES, Updates, lora
from benchmarks.contenders.prompt_rows import CLOCKS, given_answer, prompt_ids


@dataclass(frozen=True)
class Grid:
    """Rows of one width.

    Attributes:
        ids_BL: pads, prompt, answer, pads.
        real_BL: 1 at tokens, 0 at pads.
        answer_BA: 1 at tokens of the answer.
    """

    ids_BL: torch.Tensor
    real_BL: torch.Tensor
    answer_BA: torch.Tensor

    def rows(self, some: slice) -> Grid:
        """Some of them, as wide as before."""
        return Grid(self.ids_BL[some], self.real_BL[some], self.answer_BA[some])

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """For a model."""
        places_BL = (self.real_BL.cumsum(1) - 1).clamp(min=0)
        return {"input_ids": self.ids_BL, "attention_mask": self.real_BL, "position_ids": places_BL}


def grid(prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> Grid:
    """Prompts end, and answers begin, at one column."""
    before, after = max(map(len, prompts)), max(map(len, answers))
    ids = torch.zeros(len(prompts), before + after, dtype=torch.long)
    real, said = torch.zeros_like(ids), torch.zeros(len(prompts), after)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        tokens = slice(before - len(prompt), before + len(answer))
        ids[row, tokens] = torch.tensor(prompt + answer)
        real[row, tokens] = 1
        said[row, : len(answer)] = 1
    return Grid(ids, real, said)


@dataclass
class Part:
    """A mini-batch of a rollout: what was found when it was collected, ``[B, A]`` each."""

    grid: Grid
    old_BA: torch.Tensor
    values_BA: torch.Tensor
    rewards_BA: torch.Tensor
    advantages_BA: torch.Tensor
    returns_BA: torch.Tensor


class SeparatePpo:
    """Policy, critic, reference and reward model.

    Args:
        folder: model folder.
        reward: adapter of the reward model, with ``value_head.safetensors`` beside it.
        rows: alpaca rows, taken in order, again from the start when they end.
        unit: the work unit; its ``settings`` mean what tunesmith's keys mean.
        seed: of adapters, answers and the order of mini-batches.
    """

    def __init__(self, folder: str, reward: str, rows: list[dict[str, str]], unit: dict[str, Any], seed: int = 42) -> None:
        torch.manual_seed(seed)
        self.unit, self.keys, self.seed = unit, unit["settings"], seed
        dtype = DTYPES[unit["dtype"]]
        self.clock = CLOCKS[unit["clock"]]
        self.autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        ends = GenerationConfig.from_pretrained(folder).eos_token_id
        self.ends = sorted({*(ends if isinstance(ends, list) else [ends]), self.tokenizer.eos_token_id} - {None})
        self.policy = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), lora("CAUSAL_LM")).train()
        critic = AutoModel.from_pretrained(folder, dtype=dtype)
        self.critic = get_peft_model(critic, lora("FEATURE_EXTRACTION")).train()
        self.critic_head = torch.nn.Linear(critic.config.hidden_size, 1)
        torch.nn.init.zeros_(self.critic_head.weight)
        torch.nn.init.zeros_(self.critic_head.bias)
        self.reference = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).requires_grad_(False)
        judge = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), reward)
        self.judge = judge.merge_and_unload().get_decoder().requires_grad_(False)
        self.judge_head = load_file(f"{reward}/value_head.safetensors")
        prompts = [(ids, row) for row in rows if len(ids := prompt_ids(self.tokenizer, row)) <= unit["cutoff"]]
        self.rollouts = [prompts[i : i + unit["prompts"]] for i in range(0, len(prompts), unit["prompts"])]
        trained = [p for model in (self.policy, self.critic, self.critic_head) for p in model.parameters() if p.requires_grad]
        updates = unit["epochs"] * -(-unit["prompts"] * unit["samples"] // unit["batch"])
        self.updates = Updates(trained, unit["steps"] * updates, unit["rate"])
        self.first: dict[str, float] = {}

    def iterate(self, index: int) -> dict[str, Any]:
        """A rollout, and all updates on it."""
        asked = [pair for pair in self.rollouts[index % len(self.rollouts)] for _ in range(self.unit["samples"])]
        prompts = [ids for ids, _ in asked]
        began = self.clock()
        if self.unit["given"]:
            answers = [given_answer(self.tokenizer, row, self.unit["new"]) for _, row in asked]
        else:
            answers = self.sampled(prompts)
        sampled = self.clock()
        parts = self.collected(prompts, answers)
        scored = self.clock()
        losses = [self.update(part) for part in self.order(parts, index)]
        done = self.clock()
        self.first = self.first or losses[0]
        whole = [part.grid for part in parts]
        return {
            "seconds": done - began, "rollout": sampled - began, "scoring": scored - sampled, "updates": done - scored,
            "tokens": sum(map(len, answers)), "answers": len(answers), "losses": losses,
            "first": self.first, "real": sum(int(one.real_BL.sum()) for one in whole),
            "positions": sum(one.ids_BL.numel() for one in whole),
        }  # fmt: skip

    # ---- the rollout

    @torch.no_grad()
    def sampled(self, prompts: list[list[int]]) -> list[list[int]]:
        """An answer to each, up to its end token."""
        left = grid(prompts, [[] for _ in prompts])
        self.policy.eval()
        with self.autocast:
            made = self.policy.generate(
                input_ids=left.ids_BL, attention_mask=left.real_BL, do_sample=True, temperature=1.0, top_p=1.0, top_k=0,
                max_new_tokens=self.unit["new"], eos_token_id=self.ends, pad_token_id=self.ends[0],
            )  # fmt: skip
        self.policy.train()
        return [self.up_to_end(row) for row in made[:, left.ids_BL.shape[1] :].tolist()]

    def up_to_end(self, ids: list[int]) -> list[int]:
        """Without what stands behind the first end token."""
        ended = next((place for place, token in enumerate(ids) if token in self.ends), len(ids))
        return ids[: ended + 1]

    @torch.no_grad()
    def collected(self, prompts: list[list[int]], answers: list[list[int]]) -> list[Part]:
        """What all four models say of a rollout, in mini-batches, and what that teaches."""
        whole, size, keys, parts = grid(prompts, answers), self.unit["batch"], self.keys, []
        for begin in range(0, len(prompts), size):
            some = slice(begin, begin + size)
            part = whole.rows(some)
            old, _ = self.logps(self.policy, part)
            kl = (old - self.logps(self.reference, part)[0]) * part.answer_BA
            rewards = -keys["kl_coef"] * kl
            last = part.answer_BA.sum(1).long() - 1
            rewards[torch.arange(len(last)), last] += self.scores(prompts[some], answers[some])
            values = self.values(part) * part.answer_BA
            advantages = self.gae(rewards, values, part.answer_BA)
            parts.append(Part(part, old, values, rewards, advantages, advantages + values))
        said = torch.cat([part.advantages_BA[part.grid.answer_BA > 0] for part in parts])
        for part in parts:
            part.advantages_BA = (part.advantages_BA - said.mean()) * torch.rsqrt(said.var() + 1e-8)
        return parts

    def logps(self, model: Any, part: Grid) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the answers' tokens, and entropies in their places, ``[B, A]`` each."""
        width = part.answer_BA.shape[1]
        with self.autocast:
            logits_BLV = model(**part.inputs, use_cache=False).logits
        all_BAV = logits_BLV[:, -width - 1 : -1].float().log_softmax(-1)
        with torch.no_grad():
            entropies_BA = -(all_BAV.exp() * all_BAV).sum(-1)
        return all_BAV.gather(2, part.ids_BL[:, -width:, None])[..., 0], entropies_BA

    def values(self, part: Grid) -> torch.Tensor:
        """What the critic expects before each token of the answers, ``[B, A]``."""
        with self.autocast:
            states = self.critic(**part.inputs, use_cache=False).last_hidden_state
        width = part.answer_BA.shape[1]
        return self.critic_head(states.float())[:, -width - 1 : -1, 0]

    def scores(self, prompts: list[list[int]], answers: list[list[int]]) -> torch.Tensor:
        """Of the reward model, at the last token of what the template makes of an answer that ended, ``[B]``."""
        ended = [answer[-1] in self.ends for answer in answers]
        said = [answer[:-1] + self.ending if end else answer for answer, end in zip(answers, ended, strict=True)]
        part = grid(prompts, said)
        with self.autocast:
            states = self.judge(**part.inputs, use_cache=False).last_hidden_state
        start = part.ids_BL.shape[1] - part.answer_BA.shape[1]
        last = states[torch.arange(len(said)), start + part.answer_BA.sum(1).long() - 1]
        weight, bias = self.judge_head["v_head.summary.weight"], self.judge_head["v_head.summary.bias"]
        return torch.nn.functional.linear(last.float(), weight, bias)[:, 0]

    @property
    def ending(self) -> list[int]:
        """The end token and what the template puts behind it."""
        turns = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Good day."}]
        ids: list[int] = self.tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
        return ids[max(place for place, token in enumerate(ids) if token in self.ends) :]

    def gae(self, rewards_BA: torch.Tensor, values_BA: torch.Tensor, answer_BA: torch.Tensor) -> torch.Tensor:
        """From the last column backwards."""
        gamma, lam = self.keys["gamma"], self.keys["gae_lambda"]
        advantages_BA = torch.zeros_like(rewards_BA)
        later = following = torch.zeros(len(rewards_BA))
        for column in reversed(range(rewards_BA.shape[1])):
            delta = rewards_BA[:, column] + gamma * following - values_BA[:, column]
            later = (delta + gamma * lam * later) * answer_BA[:, column]
            advantages_BA[:, column], following = later, values_BA[:, column]
        return advantages_BA

    # ---- updates

    def order(self, parts: list[Part], index: int) -> Iterator[Part]:
        """Mini-batches of all passes; after the first pass in the order that tunesmith draws."""
        for number in range(self.unit["epochs"]):
            places = np.arange(len(parts))
            if number:
                places = np.random.default_rng([self.seed, 0, index, number]).permutation(places)
            yield from (parts[place] for place in places)

    def update(self, part: Part) -> dict[str, float]:
        """Clipped losses of policy and critic on one mini-batch."""
        keys, answer_BA = self.keys, part.grid.answer_BA
        logp_BA, entropy_BA = self.logps(self.policy, part.grid)
        values_BA = self.values(part.grid)
        ratio_BA = ((logp_BA - part.old_BA) * answer_BA).exp()
        clipped_BA = ratio_BA.clamp(1 - keys["cliprange"], 1 + keys["cliprange"])
        policy_BA = torch.maximum(-part.advantages_BA * ratio_BA, -part.advantages_BA * clipped_BA)
        bound = keys["cliprange_value"]
        near_BA = torch.clamp(values_BA, part.values_BA - bound, part.values_BA + bound)
        value_BA = torch.maximum((values_BA - part.returns_BA) ** 2, (near_BA - part.returns_BA) ** 2) / 2
        policy, value, entropy = ((one * answer_BA).sum() / answer_BA.sum() for one in (policy_BA, value_BA, entropy_BA))
        loss, norm = self.updates.make(policy + keys["vf_coef"] * value)
        return {"loss": loss, "policy": policy.item(), "value": value.item(), "entropy": entropy.item(), "norm": norm}


def main() -> None:
    """Answer each line with an iteration."""
    folder, reward, rows, unit = sys.argv[1], sys.argv[2], Path(sys.argv[3]), json.loads(sys.argv[4])
    loop = SeparatePpo(folder, reward, json.loads(rows.read_text(encoding="utf-8")), unit)
    print(json.dumps({"ready": "separate"}), flush=True)
    for index, _ in enumerate(sys.stdin):
        print(json.dumps(loop.iterate(index)), flush=True)


if __name__ == "__main__":
    main()

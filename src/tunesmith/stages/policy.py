"""Learning from answers of one's own: what stages ppo and grpo share.

An iteration has the numbered steps of ``docs/rl.md``: this module makes 1 to 3, 7 and 8, ``ppo.py`` and ``grpo.py`` the rest.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from tunesmith.config.arguments import GeneratingArguments, PolicyArguments, TrainingArguments
from tunesmith.config.policy import RolloutSize
from tunesmith.data.kinds import Rows
from tunesmith.data.loader import DataLoader
from tunesmith.data.streaming import ExampleStream
from tunesmith.errors import CheckpointError, ModelError
from tunesmith.generate.batch import Answer
from tunesmith.losses.advantage import RunningMoments, clip_scores
from tunesmith.losses.policy import AdaptiveKL, FixedKL, KLController, Level, approx_kl, clipped_policy_loss, clipped_tokens
from tunesmith.model.adapter import head_of, save_finished
from tunesmith.model.memory import out_of_memory_explained
from tunesmith.stages.rewards import Answered, Rewards, Scored
from tunesmith.stages.rollout import RolloutLoader, answers_batch, load_rollout, save_rollout
from tunesmith.stages.scores import policy_scores
from tunesmith.train.checkpoint import read_json, write_json
from tunesmith.train.runfiles import ANSWERS, ROLLOUT_ADAPTER
from tunesmith.train.step import StepResult, add_metrics, means
from tunesmith.train.trainer import Ingredients, PeftTrainer
from tunesmith.types import Batch, LossOutput, PolicyTargets, PromptExample

_CONTROL = "policy.json"
_EVALUATION = 1 << 30
"""First number of the keys of evaluation answers, so that none of them shares its random numbers with a rollout's."""
_SHOWN = 2
_LARGEST = 1e18
"""Of a score: deviations of scores, and the value loss, are sums of squares."""


class Engine(Protocol):
    """What makes answers: ``generate/batch.py``, or ``generate/remote.py``."""

    def answers(
        self,
        prompts: Sequence[np.ndarray],
        args: GeneratingArguments,
        keys: Sequence[tuple[int, ...]],
        samples: int = 1,
        room: Sequence[int] | None = None,
        seed: int = 0,
    ) -> list[list[Answer]]:
        """``samples`` answers to each prompt; what is drawn for one depends on its key and the seed alone."""


@dataclass(frozen=True)
class Actors:
    """Who takes part in a rollout beside the policy.

    Attributes:
        engine: makes the answers.
        rewards: says what they are worth.
        reference: log-probabilities of a batch's targets under the reference, given the temperature, float32 ``[S]``.
        sync: hands an engine elsewhere the policy's adapter in a folder, and a number for it; None: the engine has it.
    """

    engine: Engine
    rewards: Rewards
    reference: Callable[[Batch, float], torch.Tensor]
    sync: Callable[[Path, int], None] | None = None


@dataclass(frozen=True)
class PolicyIngredients(Ingredients):
    """And of a policy: how it answers, and what becomes of the answers.

    Attributes:
        policy: rollouts, rewards, losses.
        generating: how answers are sampled.
        actors: who takes part; None only where nothing is collected.
    """

    policy: PolicyArguments = field(default_factory=PolicyArguments)
    generating: GeneratingArguments = field(default_factory=GeneratingArguments)
    actors: Actors | None = None


@dataclass
class Measured:
    """A micro-batch of a rollout, and what the models say of it: float32 ``[S]`` each.

    Attributes:
        batch: prompts and answers.
        scores_R: rewards of the answers, float32 ``[R]``.
        groups_R: number of the prompt of each, int64 ``[R]``.
        ended_R: whether an answer ended, bool ``[R]``.
        logp_S: log-probabilities under the policy; None: the update that follows computes them itself.
        reference_S: under the reference; None: not needed.
        values_S: what the policy expected; None: it expects nothing.
    """

    batch: Batch
    scores_R: torch.Tensor
    groups_R: torch.Tensor
    ended_R: torch.Tensor
    logp_S: torch.Tensor | None = None
    reference_S: torch.Tensor | None = None
    values_S: torch.Tensor | None = None


class PolicyPeftTrainer(PeftTrainer):
    """Collects rollouts, and learns from each for some passes. Subclasses say what an answer's tokens teach, and the loss."""

    given: PolicyIngredients

    def __init__(self, args: TrainingArguments, given: PolicyIngredients) -> None:
        self.policy = given.policy
        super().__init__(args, given)
        self.moments = RunningMoments()
        self._synced: int | None = None
        coef = self.policy.kl_coef or 0.0
        adaptive = self.policy.kl_control == "adaptive"
        self.control: KLController = (
            AdaptiveKL(coef, self.policy.ppo_target, self.policy.kl_horizon) if adaptive else FixedKL(coef)
        )
        self.fresh: dict[str, tuple[float, int]] = {}
        """What was measured of a rollout, until its first update is logged."""

    # ---- what stages override

    needs_values = False

    def targets(self, rollout: Sequence[Measured]) -> list[PolicyTargets]:
        """What each micro-batch of a rollout teaches: steps 4 to 6."""
        raise TypeError(f"{type(self).__name__} learns nothing: a stage's trainer says what answers teach")

    # ---- an iteration

    def build_loader(self, seed: int) -> RolloutLoader:
        """Rollouts of prompts."""
        rows, size = self.given.train_examples, RolloutSize.of(self.args, self.policy)
        assert not isinstance(rows, ExampleStream), "rules refuse streams of prompts"
        return RolloutLoader(DataLoader(rows, size.prompts, 1, seed, self.given.shuffle), self.collect, size)

    @property
    def lone_update(self) -> bool:
        """Whether each rollout is learned from in one update, so that the policy is still the one that made it."""
        return self.policy.ppo_epochs == 1 and self.policy.ppo_buffer_size == 1

    @torch.no_grad()
    def collect(self, epoch: int, number: int, rows: Sequence[int]) -> list[Batch]:
        """A rollout: answers to these prompts, their rewards, and what they teach.

        Where it breaks off, nothing has changed, so that it is collected again when the run goes on.
        """
        before = self.control, self.moments
        try:
            with self.stop.giving_up():
                return self._collected(epoch, number, rows)
        except BaseException:
            self.control, self.moments = before
            raise

    def _collected(self, epoch: int, number: int, rows: Sequence[int]) -> list[Batch]:
        """Steps 1 to 6."""
        given = self.given.train_examples
        assert isinstance(given, Rows)
        prompts: list[PromptExample] = [given[row] for row in rows]
        samples = self.policy.num_generations or 1
        keys = [(epoch, number, place) for place in range(len(prompts))]
        answered, pace = self._answers(prompts, keys, samples, self._room(keys))  # step 1
        began = time.monotonic()
        scored = self._actors.rewards(answered)  # step 2
        scores_A = self._adjusted(scored.total_R, answered)
        size = self.args.per_device_train_batch_size
        rollout = []
        for begin in range(0, len(answered), size):  # step 3
            some = slice(begin, begin + size)
            groups_R = torch.arange(begin, min(begin + size, len(answered))) // samples
            ended_R = torch.tensor([answer.ended for answer in answered[some]])
            rollout.append(self._measured(answers_batch(answered[some]), scores_A[some], groups_R, ended_R))
        taught = self.targets(rollout)  # steps 4 to 6, and 11
        self.fresh |= {**_described(answered, scored), **pace, "score_seconds": (time.monotonic() - began, 1)}
        return [replace(part.batch, policy=targets) for part, targets in zip(rollout, taught, strict=True)]

    @property
    def _actors(self) -> Actors:
        assert self.given.actors is not None, "nothing is collected where a run is only planned"
        return self.given.actors

    def _room(self, keys: Sequence[tuple[int, ...]]) -> list[int] | None:
        """Limit of new tokens for the answers to each prompt, where it is drawn."""
        if not self.policy.response_lengths:
            return None
        least, most = self.policy.response_lengths
        return [int(np.random.default_rng([self.args.seed, *key]).integers(least, most + 1)) for key in keys]

    def _answers(
        self, prompts: Sequence[PromptExample], keys: Sequence[tuple[int, ...]], samples: int, room: Sequence[int] | None
    ) -> tuple[list[Answered], dict[str, tuple[float, int]]]:
        """Step 1: answers, those to one prompt next to each other; and how fast they came."""
        if self._actors.sync is not None and self._synced != self.state.step:
            self._actors.sync(self._published(), self.state.step)
            self._synced = self.state.step
        began = time.monotonic()
        ids = [prompt.input_ids for prompt in prompts]
        found = self._actors.engine.answers(ids, self.given.generating, keys, samples, room, self.args.seed)
        seconds = time.monotonic() - began
        flat = [(prompt, answer) for prompt, answers in zip(prompts, found, strict=True) for answer in answers]
        texts = self.given.tokenizer.batch_decode([answer.ids for _, answer in flat], skip_special_tokens=True)
        answered = [
            Answered(prompt, answer.ids, text, answer.ended) for (prompt, answer), text in zip(flat, texts, strict=True)
        ]
        tokens = sum(len(answer.ids) for _, answer in flat)
        return answered, {"rollout_seconds": (seconds, 1), "rollout_tokens_per_second": (tokens / max(seconds, 1e-9), 1)}

    def _published(self) -> Path:
        """The folder from which an engine elsewhere reads the policy."""
        folder = self.given.run / ROLLOUT_ADAPTER
        folder.mkdir(exist_ok=True)
        save_finished(self.model, folder)
        return folder

    def _adjusted(self, total_A: torch.Tensor, answered: Sequence[Answered]) -> torch.Tensor:
        """Step 2: normalised (in stage ppo), bounded; then what it costs not to end, so that no bound hides it.

        Raises:
            ModelError: a score whose square is no number of float32; names the row.
        """
        if self.needs_values and self.policy.score_norm:  # groups are scaled among themselves
            self.moments = self.moments.updated(total_A)
            total_A = self.moments.normalised(total_A, shift_mean=False)
        scores_A = total_A if self.policy.reward_clip is None else clip_scores(total_A, self.policy.reward_clip)
        most = int(scores_A.abs().argmax())
        if scores_A[most].abs() > _LARGEST:
            raise ModelError(
                f"the reward of {answered[most].prompt.source} comes to {float(scores_A[most]):.3g}, whose square is too large "
                "for float32; give smaller weights, or reward_clip"
            )
        ended_A = torch.tensor([answer.ended for answer in answered])
        return scores_A - self.policy.missing_eos_penalty * (~ended_A).float()

    def _measured(self, batch: Batch, scores_R: torch.Tensor, groups_R: torch.Tensor, ended_R: torch.Tensor) -> Measured:
        """Step 3: what policy and reference say of a micro-batch, on the host."""
        part = Measured(batch, scores_R, groups_R, ended_R)
        given, temperature = self.given, self.given.generating.temperature
        on_device = batch.to(given.device)
        with out_of_memory_explained("in a rollout", [batch]):
            if not self.lone_update or self.needs_values:
                head = head_of(self.model) if self.needs_values else None
                logp_S, _, values_S = policy_scores(given, on_device, temperature, head=head)
                part.logp_S = logp_S.cpu()
                part.values_S = None if values_S is None else values_S.cpu()
            if self.policy.kl_coef:
                part.reference_S = self._actors.reference(on_device, temperature).cpu()
        return part

    def training_step(self, window: Sequence[Batch]) -> StepResult:
        """One update; with the first one of a rollout, what was measured of it is logged."""
        result = super().training_step(window)
        self.state.metrics = add_metrics(self.state.metrics, self.fresh)
        self.fresh = {}
        target, moved = self.policy.target_kl, means(result.metrics).get("policy_kl", 0.0)
        if target is not None and moved > target:
            assert isinstance(self.loader, RolloutLoader)
            self.loader.leave()  # step 7
        return result

    def epoch_ended(self, planned: bool) -> bool:
        """Also where the last rollout of an epoch was left."""
        assert isinstance(self.loader, RolloutLoader)
        return self.loader.at.epoch > self.state.epoch

    def surrogate(
        self, batch: Batch, logp_S: torch.Tensor, level: Level = "token"
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Step 8: the clipped loss of each token, and what people watch of it, ``[S]`` each."""
        taught, policy = batch.policy, self.policy
        assert taught is not None
        old_S = logp_S.detach() if taught.old_S is None else taught.old_S
        low, high = policy.cliprange, policy.cliprange_high or policy.cliprange
        ratio = (logp_S, old_S, taught.advantages_S, taught.row_S, low, high, level)
        watched = {"policy_kl": approx_kl(logp_S.detach(), old_S), "clip_share": clipped_tokens(*ratio).float()}
        return clipped_policy_loss(*ratio), watched

    @staticmethod
    def outcome(batch: Batch, losses_S: torch.Tensor, watched: dict[str, torch.Tensor]) -> LossOutput:
        """The loss with each token's weight, and sums over tokens of what is watched."""
        weighted_S = losses_S if batch.weights_S is None else losses_S * batch.weights_S
        sums = torch.stack([values_S.detach().sum() for values_S in watched.values()]).tolist()
        named = {name: (value, batch.num_targets) for name, value in zip(watched, sums, strict=True)}
        return LossOutput(weighted_S.sum(), batch.total_weight, named)

    # ---- evaluation

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Rewards of an answer to each evaluation prompt, sampled with the same random numbers each time."""
        rows = self.given.eval_examples
        assert isinstance(rows, Rows)
        prompts: list[PromptExample] = [rows[row] for row in range(len(rows))]
        keys = [(_EVALUATION, row) for row in range(len(prompts))]
        room = [self.policy.response_lengths[1]] * len(prompts) if self.policy.response_lengths else None
        answered, _ = self._answers(prompts, keys, 1, room)
        scored = self._actors.rewards(answered)
        self._keep(answered, scored)
        return {f"eval_{name}": mean for name, mean in means(_described(answered, scored)).items()}

    def _keep(self, answered: Sequence[Answered], scored: Scored) -> None:
        """Write the answers where a person can read them, and show the first ones."""
        lines = [
            json.dumps(
                {"step": self.state.step, "row": str(answer.prompt.source), "prompt": _question(answer.prompt),
                 "response": answer.text, "reward": reward, "ended": answer.ended},
                ensure_ascii=False,
            ) + "\n"
            for answer, reward in zip(answered, scored.total_R.tolist(), strict=True)
        ]  # fmt: skip
        scratch = self.given.run / f".{ANSWERS}.partial"
        scratch.write_text("".join(lines), encoding="utf-8")
        scratch.replace(self.given.run / ANSWERS)
        for answer, reward in list(zip(answered, scored.total_R.tolist(), strict=True))[:_SHOWN]:
            said = " ".join(answer.text.split())
            self.given.reporter.note(f"step {self.state.step}: {_question(answer.prompt)}  ->  {said}  (reward {reward:.3f})")

    # ---- checkpoints

    def save_more(self, folder: Path) -> None:
        """The rollout that is being learned from, and what steers the rewards."""
        kept = {"kl": self.control.state(), "scores": self.moments.state(), "rewards": self._actors.rewards.origins}
        write_json(folder / _CONTROL, kept)
        assert isinstance(self.loader, RolloutLoader)
        if self.loader.at.update:
            save_rollout(self.loader.batches, folder)

    def load_more(self, folder: Path) -> None:
        """What ``save_more`` wrote. Raises CheckpointError when it cannot be used."""
        saved = read_json(folder / _CONTROL)
        try:
            self.control = self.control.restored(saved["kl"])
            self.moments = RunningMoments.from_state(saved["scores"])
            origins = dict(saved["rewards"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{folder / _CONTROL}: is not what a checkpoint of this stage holds: {error!r}") from None
        for name, origin in self._actors.rewards.origins.items():
            if origins.get(name) != origin:
                self.given.reporter.note(
                    f"warning: {name} has changed since {folder.name}; further answers get the new rewards"
                )
        assert isinstance(self.loader, RolloutLoader)
        if self.state.data.get("update"):
            self.loader.batches = load_rollout(folder)


def _question(prompt: PromptExample) -> str:
    """The last thing that was said, in one line."""
    return " ".join(prompt.messages[-1].content.split())


def _described(answered: Sequence[Answered], scored: Scored) -> dict[str, tuple[float, int]]:
    """Means over answers of what people watch."""
    count = len(answered)
    named = {"reward": float(scored.total_R.sum())}
    if len(scored.parts) > 1:
        named |= {f"rewards/{name}": float(part_R.sum()) for name, part_R in scored.parts.items()}
    named["response_length"] = float(sum(len(answer.ids) for answer in answered))
    named["ended"] = float(sum(answer.ended for answer in answered))
    return {name: (value, count) for name, value in named.items()}

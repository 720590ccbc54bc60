"""What answers are worth: a reward model's score and the values of reward functions, each with its weight.

A reward model that has the policy's tokens and template scores rows of tokens as they were sampled. Behind the end token of an
answer come the tokens that the template puts there, because reward models read their score off the last token of the whole
rendering (``data/pairwise.py: PairMaker``, ``model/heads.py: row_scores``); an answer that was cut off gets none of them. All
other models are shown the conversation as their own template renders it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from tunesmith.config.arguments import PolicyArguments, RunConfig
from tunesmith.config.reward import function_of
from tunesmith.data.source import file_sha
from tunesmith.data.template import ChatTemplate
from tunesmith.data.tokenize import Text
from tunesmith.errors import DataError, ModelError
from tunesmith.model.forward import FlatForward
from tunesmith.model.origin import fingerprint
from tunesmith.model.reward import ModelScorer, Scorer, check_reward_model, load_reward_model
from tunesmith.model.scorers import EndpointScorer, FunctionScorer, prompt_and_answer
from tunesmith.rewards.shipped import SHIPPED, RewardFunction, ready
from tunesmith.types import Conversation, Message, PromptExample

MODEL = "reward_model"
"""Name of the reward model's part."""
_NAMED = 5
"""Rows that a message names."""


@dataclass(frozen=True)
class Answered:
    """An answer to a prompt.

    Attributes:
        prompt: with its turns.
        ids: int32 ``[A]``, the tokens of the answer, its end token included if it ended.
        text: of the answer, without its end token.
        ended: whether an end token was sampled.
    """

    prompt: PromptExample
    ids: np.ndarray
    text: str
    ended: bool

    @property
    def conversation(self) -> Conversation:
        """The turns of the prompt and the answer."""
        return Conversation((*self.prompt.messages, Message("assistant", self.text)), self.prompt.source, self.prompt.tools)


@dataclass(frozen=True)
class Scored:
    """What answers are worth.

    Attributes:
        total_R: float32 ``[R]`` on the CPU, one number for each answer.
        parts: what it is the weighted sum of, each float32 ``[R]`` without its weight.
    """

    total_R: torch.Tensor
    parts: dict[str, torch.Tensor]


Judge = Callable[[Sequence[Answered]], torch.Tensor]


@dataclass(frozen=True)
class Part:
    """One summand of a reward.

    Attributes:
        weight: factor.
        judge: gives float32 ``[R]``.
        compares: whether it needs the answers that the data give.
    """

    weight: float
    judge: Judge
    compares: bool = False


@dataclass(frozen=True)
class Rewards:
    """Says what answers are worth; made by ``load_rewards``.

    Attributes:
        parts: by name, as they appear in the log.
        origins: setting -> SHA-256 of the local files that it names, which tells whether they are still the same.
    """

    parts: dict[str, Part] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)

    def __call__(self, answers: Sequence[Answered]) -> Scored:
        """Judge answers.

        Raises:
            ModelError: something cannot be judged, or is worth no finite number; names the row.
            DataError: an answer is to be compared with one that the data do not give; names the row.
        """
        self.check([answer.prompt for answer in answers])
        total_R = torch.zeros(len(answers), dtype=torch.float64)
        found: dict[str, torch.Tensor] = {}
        for name, part in self.parts.items() if answers else ():
            found[name] = part.judge(answers)
            total_R += part.weight * found[name].double()
        for worth, answer in zip(total_R.float().tolist(), answers, strict=True):
            if not math.isfinite(worth):
                raise ModelError(
                    f"the reward of {answer.prompt.source} is {worth}, no finite number of float32, after weighting "
                    f"{', '.join(found)}; give smaller weights, or mend what gives such values"
                )
        return Scored(total_R.float(), found)

    def check(self, prompts: Iterable[PromptExample]) -> None:
        """Look at all prompts before a run: does each have the answer that it is to be compared with?

        Raises:
            DataError: some do not; names the first rows, and says how many they are.
        """
        comparing = [name for name, part in self.parts.items() if part.compares]
        if not comparing:
            return
        count, rows = 0, []
        for number, prompt in enumerate(prompts, 1):
            count = number
            if not prompt.reference.strip():
                rows.append(prompt.source)
        if rows:
            named = ", ".join(map(str, islice(rows, _NAMED))) + (", ..." if len(rows) > _NAMED else "")
            raise DataError(
                f"reward_functions: {', '.join(comparing)}: {len(rows)} of {count} prompts have no answer to compare with: "
                f"{named}; give one (the assistant's last turn, or response_column in dataset_info.json), or leave the rows out"
            )


def load_rewards(config: RunConfig, forward: FlatForward, tokenizer: PreTrainedTokenizerBase) -> Rewards:
    """What ``reward_model``, ``reward_functions`` and their options and weights name.

    Args:
        config: of the run.
        forward: the policy. An adapter that scores is put beside its own on the same trunk; what is trained, what is active and
            the mode of training stay as they are.
        tokenizer: of the policy, with the template of the run.

    Raises:
        ConfigError, ModelError, TemplateError: something that is named cannot be used.
    """
    policy, data = config.policy, config.data
    parts: dict[str, Part] = {}
    if config.model.reward_model is not None:
        args = config.model.model_copy(update={"compute_dtype": config.compute_dtype})
        scorer = load_reward_model(args, forward, tokenizer, data.template_date, data.template_options)
        parts[MODEL] = Part(policy.reward_weight, _model_judge(scorer, tokenizer, config))
    return Rewards(parts | _functions(policy, tokenizer), _origins(config))


def check_rewards(config: RunConfig, tokenizer: PreTrainedTokenizerBase, prompts: Iterable[PromptExample]) -> None:
    """Look at what ``load_rewards`` will need, without a model; files of functions are run.

    Raises:
        ModelError: something that is named is not there, or cannot be used.
        DataError: as ``Rewards.check``.
    """
    check_reward_model(config.model)
    Rewards(_functions(config.policy, tokenizer)).check(prompts)


def _functions(policy: PolicyArguments, tokenizer: PreTrainedTokenizerBase) -> dict[str, Part]:
    """What ``reward_functions`` names."""
    parts: dict[str, Part] = {}
    for named, weight in policy.reward_functions.items():
        if named in SHIPPED:
            function = ready(named, policy.reward_options.get(named, {}), lambda text: _tokens(tokenizer, text))
            parts[named] = Part(weight, partial(_by_rule, named, function), SHIPPED[named].compares)
        else:
            short = named.rpartition(":")[2]
            name = named if short in {*parts, *SHIPPED, MODEL} else short
            parts[name] = Part(weight, partial(_by_text, FunctionScorer(named, "reward_functions")))
    return parts


def _origins(config: RunConfig) -> dict[str, str]:
    """Of functions the files, of models the weights that lie in a folder."""
    functions = {f"reward_functions: {name}": name for name in config.policy.reward_functions if name not in SHIPPED}
    named = {"reward_model": config.model.reward_model, **functions}
    paths = {setting: function_of(name)[0] for setting, name in named.items() if name is not None}
    files = {setting: file_sha(path) for setting, path in paths.items() if path.is_file()}
    return files | {setting: fingerprint(path) for setting, path in paths.items() if path.is_dir()}


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False))


# ---- functions and servers


def _by_rule(name: str, function: RewardFunction, answers: Sequence[Answered]) -> torch.Tensor:
    """Values of a shipped function."""
    pairs = [prompt_and_answer(answer.conversation) for answer in answers]
    prompts, texts = [prompt for prompt, _ in pairs], [text for _, text in pairs]
    found = function(prompts, texts, [answer.prompt.reference for answer in answers])
    assert len(found) == len(answers), name
    return torch.tensor(found, dtype=torch.float32)


def _by_text(scorer: FunctionScorer | EndpointScorer, answers: Sequence[Answered]) -> torch.Tensor:
    """Values of a function of the user's, or of a server."""
    return scorer.scores([answer.conversation for answer in answers], [answer.prompt.reference for answer in answers])


# ---- models


def _model_judge(scorer: Scorer, tokenizer: PreTrainedTokenizerBase, config: RunConfig) -> Judge:
    if isinstance(scorer, FunctionScorer | EndpointScorer):
        return partial(_by_text, scorer)
    assert isinstance(scorer, ModelScorer)
    ours, theirs = ChatTemplate(tokenizer, config.data.template_date, options=config.data.template_options), scorer.template
    same = (ours.source, ours.encoder.digest, ours.options) == (theirs.source, theirs.encoder.digest, theirs.options)
    return _ByModel(scorer, as_they_are=same)


class _ByModel:
    """Scores of a model with a value head.

    Args:
        scorer: the model.
        as_they_are: whether the policy's tokens are the model's, and rendered alike.
    """

    def __init__(self, scorer: ModelScorer, as_they_are: bool) -> None:
        self._scorer = scorer
        self._as_they_are = as_they_are
        self._ending: np.ndarray | None = None

    def __call__(self, answers: Sequence[Answered]) -> torch.Tensor:
        rows = [self._row(answer) for answer in answers]
        most = self._scorer.positions
        for row, answer in zip(rows, answers, strict=True):
            if most is not None and len(row) > most:
                raise ModelError(
                    f"reward_model: {answer.prompt.source}: prompt and answer have {len(row):,} tokens, and the model was made "
                    f"for {most:,}; set a smaller cutoff_len or max_new_tokens"
                )
        scores_R = self._scorer.row_scores(rows)
        for score, answer in zip(scores_R.tolist(), answers, strict=True):
            if not math.isfinite(score):
                raise ModelError(f"reward_model: the score of {answer.prompt.source} is {score}; the model is spoiled")
        return scores_R

    def _row(self, answer: Answered) -> np.ndarray:
        """Token ids of what is scored, int32 ``[L]``."""
        if not self._as_they_are:
            return self._scorer.encode(answer.conversation, answer.ended, sampled=True)
        said = (answer.ids[:-1], self._end(answer)) if answer.ended else (answer.ids,)
        return np.concatenate([answer.prompt.input_ids, *said]).astype(np.int32)

    def _end(self, answer: Answered) -> np.ndarray:
        """The template's end token and the tokens behind it, found once, on the turns of some prompt."""
        if self._ending is None:
            template = self._scorer.template
            earlier = [replace(message, weight=0.0) for message in answer.prompt.messages]
            turns = (*earlier, Message("assistant", "Good day."))
            text = template.rendered(turns, answer.prompt.tools)
            (tokens,) = template.encoder.encode([Text(text.text, ((text.turns[-1].start, text.turns[-1].end),), text.data)])
            turn = tokens.ids[tokens.spans[-1][0] :]
            ends = np.flatnonzero(np.isin(turn, template.end_ids))
            self._ending = turn[ends[0] :] if len(ends) else answer.ids[-1:]
        return self._ending

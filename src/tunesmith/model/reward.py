"""What scores answers: a model with a value head, a Python function, or a server; one interface for all.

A ``Scorer`` is given conversations that end with the answer, and returns one number for each. The two that are models
(``ModelScorer``) also score rows of tokens as they are, which is what a policy on the same trunk has at hand: no text is made
of them and read again, and an answer that was cut off is not given an end.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tunesmith.config.arguments import ModelArguments
from tunesmith.config.load import load_config
from tunesmith.config.reward import reward_problems
from tunesmith.data.collator import collate_ids
from tunesmith.data.template import ChatTemplate
from tunesmith.data.tokenize import Text
from tunesmith.errors import ConfigError, ModelError, TemplateError
from tunesmith.model.adapter import beneath_of, unwrap
from tunesmith.model.files import CONFIG, check_adapter_folder, read_json
from tunesmith.model.forward import FlatForward
from tunesmith.model.heads import ValueHead, has_head, head_width, load_value_head, no_head, row_scores, sequence_head
from tunesmith.model.library import quiet_library
from tunesmith.model.lineage import line_of, put_beside, with_adapter
from tunesmith.model.load import load_base_model, load_classifier, prepare_flat
from tunesmith.model.origin import fingerprint, read_origin
from tunesmith.model.precision import autocast, pick_device, resolve_dtype
from tunesmith.model.quantize import is_quantised
from tunesmith.model.roles import playing
from tunesmith.model.scorers import EndpointScorer, FunctionScorer, parted
from tunesmith.model.settings import positions
from tunesmith.model.source import Source, locate, resolve_base
from tunesmith.model.tokenizer import load_tokenizer, read_tokenizer
from tunesmith.types import Conversation

log = logging.getLogger(__name__)

REWARD = "reward"
"""Name of the reward model's adapter on a shared trunk."""
HEEDED_BY_WHOLE = (
    "cache_dir", "use_auth_token", "compute_dtype", "attn_implementation", "upcast_layernorm", "layer_norm_names",
)  # fmt: skip
"""What a reward model of ``reward_model_type: full`` takes from the arguments."""
_RUN = "config.yaml"
_MOST_TOKENS = 8192
"""Computed at once."""


class Scorer(Protocol):
    """Scores answers."""

    def scores(self, answered: Sequence[Conversation]) -> torch.Tensor:
        """One number per conversation, each of which ends with the assistant's answer: float32 ``[N]`` on the CPU.

        Raises:
            ModelError: an answer cannot be scored, or the score is no finite number; names the row.
        """


class ModelScorer:
    """A trunk and a value head.

    Args:
        forward: the trunk, adapted or not.
        head: reads the score off the last token.
        template: renders conversations for this model.
        role: made anew for each use: within it the trunk plays the reward model.
        dtype: to compute in.
    """

    def __init__(
        self,
        forward: FlatForward,
        head: ValueHead,
        template: ChatTemplate,
        role: Callable[[], AbstractContextManager[None]],
        dtype: torch.dtype,
    ) -> None:
        self.forward = forward
        self.template = template
        self._device = next(forward.model.parameters()).device
        self._head = head.to(self._device).requires_grad_(False)
        self._role = role
        self._dtype = dtype

    def scores(self, answered: Sequence[Conversation]) -> torch.Tensor:
        """As ``Scorer``: each conversation as the template shows it, its end included."""
        scores = self.row_scores([self.encode(conversation) for conversation in answered])
        for conversation, score in zip(answered, scores.tolist(), strict=True):
            if not math.isfinite(score):
                raise ModelError(f"reward_model: the score of {conversation.source} is {score}; the model is spoiled")
        return scores

    @property
    def positions(self) -> int | None:
        """Tokens that the model was made for, where it says."""
        return positions(unwrap(self.forward.model).config)

    def encode(self, conversation: Conversation, ended: bool = True, sampled: bool = False) -> np.ndarray:
        """Token ids of a conversation that ends with the answer, int32. Raises ModelError, which names the row.

        Args:
            conversation: to be rendered.
            ended: whether the answer has an end; what the template writes behind it is left out if not.
            sampled: the answer is what some model said: it may be empty, or such that the template does not show all of it.
        """
        earlier, answer = parted(conversation)
        shown = [replace(message, weight=0.0) for message in earlier]
        try:
            rendered = self.template.rendered([*shown, replace(answer, weight=0.0 if sampled else 1.0)], conversation.tools)
        except TemplateError as error:
            raise ModelError(f"reward_model: {conversation.source}: {error}") from error
        text = rendered.text if ended else rendered.text.removesuffix(self.template.turn_ending)
        (tokens,) = self.template.encoder.encode([Text(text, (), rendered.data)])
        return tokens.ids

    @torch.no_grad()
    def row_scores(self, rows: Sequence[np.ndarray]) -> torch.Tensor:
        """What the head says at the last token of each row: float32 ``[N]`` on the CPU.

        Args:
            rows: token ids, prompt and answer, of this model's own vocabulary; no pads.
        """
        scores = torch.empty(len(rows))
        with self._role(), _evaluating(self.forward.model), autocast(self._device, self._dtype):
            for some in _portions([len(row) for row in rows]):
                found = row_scores(self.forward, self._head, collate_ids([rows[i] for i in some]).to(self._device))
                scores[some] = found.cpu()
        return scores


def _portions(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Rows that are computed together, of similar length, the longest first."""
    portion: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if portion and (len(portion) + 1) * lengths[portion[0]] > _MOST_TOKENS:
            yield portion
            portion = []
        portion.append(index)
    if portion:
        yield portion


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def load_reward_model(
    args: ModelArguments,
    trunk: FlatForward | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    date: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Scorer:
    """What ``reward_model`` and ``reward_model_type`` name. Naming a Python function is the consent to run its file.

    Args:
        args: of the model that is trained; ``reward_model``, ``reward_model_type``, ``reward_timeout`` say what scores it.
        trunk: ``lora``: the adapted model on whose frozen base the reward adapter is put, beside its own; the base of ``args``
            is loaded if None. Others do not use it.
        tokenizer: ``lora``: of the trunk; loaded if None. The one beside the reward adapter goes before it.
        date: what templates take for today (ISO format); the real day if None.
        options: further variables for the template, such as ``enable_thinking``.

    Raises:
        ConfigError: the keys do not say what scores; or ``lora`` on a trunk that is trained itself.
        ModelError: files that are missing, damaged, pickled, or do not fit; a head that is missing or was never trained; a
            function that cannot be imported.
    """
    if problems := list(reward_problems(args)):
        raise ConfigError("\n".join(f"{key}: {message}" for key, message in problems), [("", *one) for one in problems])
    assert args.reward_model is not None
    match args.reward_model_type:
        case "function":
            return FunctionScorer(args.reward_model)
        case "api":
            return EndpointScorer(args.reward_model, args.reward_timeout or 60)
        case "lora":
            return _adapter(args, Path(args.reward_model).expanduser(), trunk, tokenizer, date, options or {})
        case "full":
            return _whole(args, date, options or {})


def check_reward_model(args: ModelArguments) -> None:
    """Look at what ``reward_model`` names without reading weights; the file of a function is run.

    Raises:
        ModelError: it is not there, or is none that scores.
    """
    named = args.reward_model
    if named is not None and args.reward_model_type == "function":
        FunctionScorer(named)
    elif named is not None and args.reward_model_type == "lora":
        _check_adapter(Path(named).expanduser())
    elif named is not None and args.reward_model_type == "full":
        _located(args)


# ---- an adapter on the trunk


def _check_adapter(folder: Path) -> None:
    if not folder.exists():
        raise ModelError(f"reward_model: no such folder: {folder}")
    if resolve_base(folder, "reward_model").kind != "adapter":
        raise ModelError(f"reward_model: {folder} holds a whole model; set reward_model_type: full")
    check_adapter_folder(folder)
    if not has_head(folder):
        raise no_head(folder)


def _adapter(
    args: ModelArguments,
    folder: Path,
    trunk: FlatForward | None,
    tokenizer: PreTrainedTokenizerBase | None,
    date: str | None,
    options: Mapping[str, Any],
) -> ModelScorer:
    _check_adapter(folder)
    _compare_bases(args, folder)
    if trunk is None:
        trunk = _lone_trunk(args, folder)
    else:
        _put_on(trunk.model, folder)
    model: PeftModel = trunk.model
    own = (folder / "tokenizer_config.json").is_file()
    tokenizer = read_tokenizer(folder) if own else tokenizer or load_tokenizer(args)
    head = _trained(load_value_head(folder, head_width(unwrap(model))), folder)
    dtype = resolve_dtype(args.compute_dtype, next(model.parameters()).device)
    template = ChatTemplate(tokenizer, date, options=options)
    return ModelScorer(trunk, head, template, lambda: playing(model, REWARD), dtype)


def _put_on(model: torch.nn.Module, folder: Path) -> None:
    if not isinstance(model, PeftModel):
        raise ConfigError(
            "reward_model_type: lora shares a frozen trunk with the adapter that is trained, and here the trunk itself is "
            "trained; set finetuning_type: lora, or reward_model_type: full with a whole reward model"
        )
    if beneath_of(model) and not is_quantised(unwrap(model)):
        raise ConfigError(
            "reward_model_type: lora: earlier adapters, or what pissa_init took out, were merged into the trunk, which is not "
            "what the reward model was trained on; train the last adapter on (resume_lora_training: true, one adapter), or set "
            "reward_model_type: full"
        )
    put_beside(model, REWARD, folder, head=True)


def _lone_trunk(args: ModelArguments, folder: Path) -> FlatForward:
    """The base of the arguments with nothing but the reward adapter on it."""
    base, segments = _loaded(line_of(args).on(args))
    line_of(args).put_weights(base)
    model = with_adapter(base.requires_grad_(False), folder, REWARD, head=True)
    return FlatForward(model.eval(), segments)


def _loaded(args: ModelArguments) -> tuple[PreTrainedModel, bool]:
    """A model on its device, and whether it takes rows end to end, however long."""
    quiet_library()
    device = pick_device()
    model = load_base_model(args, resolve_dtype(args.compute_dtype, device), device, load_tokenizer(args))
    return model, prepare_flat(model, args)


def _compare_bases(args: ModelArguments, folder: Path) -> None:
    """Raise ModelError unless the adapter was trained on the trunk that the arguments name."""
    line = line_of(args)
    mine = locate(line.on(args), weights=False).name
    named = resolve_base(folder, "reward_model").base
    assert named is not None
    if not _same(mine, named):
        raise ModelError(
            f"reward_model: {folder} belongs to {named}, and the trunk is {mine}; scores on another model mean nothing. Give "
            "both the same base, or set reward_model_type: full. If the two are one model under two names, correct "
            "base_model_name_or_path in its adapter_config.json"
        )
    if not (folder / _RUN).is_file():
        return
    needed = [part.sha256 for part in read_origin(folder).needs]
    if needed != [fingerprint(weights) for weights in line.weights]:
        raise ModelError(
            f"reward_model: {folder} was trained on weights of freeze runs (checkpoint_dir) that are not those of the trunk; "
            "export them, and give the export as model_name_or_path of both"
        )
    theirs = load_config(folder / _RUN)[0].model
    keys = ("quantization_bit", "quantization_type", "double_quantization")
    if any(getattr(theirs, key) != getattr(args, key) for key in keys):
        log.warning("reward_model: %s was trained on a base quantised otherwise, so its scores are somewhat off", folder)


def _same(one: str, other: str) -> bool:
    if one == other:
        return True
    paths = Path(one).expanduser(), Path(other).expanduser()
    return all(path.exists() for path in paths) and paths[0].samefile(paths[1])


def _trained(head: ValueHead, where: Path) -> ValueHead:
    if not head.summary.weight.any():
        raise ModelError(f"{where}: the value head is all zeros, as before its first update; it scores every answer the same")
    return head


# ---- a whole model


def _located(args: ModelArguments) -> tuple[ModelArguments, Source]:
    """How the reward model is loaded, and where it is."""
    assert args.reward_model is not None
    own = ModelArguments(model_name_or_path=args.reward_model, **{key: getattr(args, key) for key in HEEDED_BY_WHOLE})
    try:
        source = locate(own)
    except ModelError as error:
        raise ModelError(f"reward_model: {str(error).removeprefix('model_name_or_path: ')}") from error
    if source.adapter is not None:
        raise ModelError(f"reward_model: {args.reward_model} is an adapter; set reward_model_type: lora, or export it")
    return own, source


def _whole(args: ModelArguments, date: str | None, options: Mapping[str, Any]) -> ModelScorer:
    own, source = _located(args)
    kinds = read_json(source.path / CONFIG).get("architectures")
    classifies = isinstance(kinds, list) and any(str(kind).endswith("ForSequenceClassification") for kind in kinds)
    if has_head(source.path):
        model, segments = _loaded(own)
        head = load_value_head(source.path, head_width(model))
    elif classifies:
        quiet_library()
        device = pick_device()
        model, segments = load_classifier(own, resolve_dtype(own.compute_dtype, device), device), False
        head = sequence_head(model, source.path)
    else:
        raise no_head(source.path)
    forward = FlatForward(model.requires_grad_(False), segments)
    template = ChatTemplate(load_tokenizer(own), date, options=options)
    dtype = resolve_dtype(own.compute_dtype, next(model.parameters()).device)
    return ModelScorer(forward, _trained(head, source.path), template, nullcontext, dtype)

"""Talk to a run, or to a plain model, in the terminal."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from tunesmith.config.arguments import (
    DataArguments,
    FinetuningArguments,
    GeneratingArguments,
    ModelArguments,
    TrainingArguments,
)
from tunesmith.config.load import load_config, load_model_settings
from tunesmith.data.named import use_template
from tunesmith.data.thinking import no_effect
from tunesmith.errors import CheckpointError, ConfigError, ModelError
from tunesmith.generate.engine import ChatEngine
from tunesmith.model.adapter import load_finished
from tunesmith.model.files import ADAPTER_CONFIG
from tunesmith.model.library import quiet_library
from tunesmith.model.lineage import line_of, without_contained
from tunesmith.model.load import load_base_model, load_pretrained
from tunesmith.model.precision import pick_device, resolve_dtype
from tunesmith.model.tokenizer import read_tokenizer
from tunesmith.train.runfiles import CONFIG, is_finished
from tunesmith.types import Message

TRAINING_KEYS = {key for cls in (DataArguments, FinetuningArguments, TrainingArguments) for key in cls.model_fields} - {
    "default_system",
    "enable_thinking",
    "template_date",
}
"""Keys that would have no effect in a chat, and are refused there."""

log = logging.getLogger(__name__)
_HELP = "/clear forgets the conversation, /system TEXT sets the system message, /exit ends (Ctrl-D too)"


@dataclass(frozen=True)
class Chat:
    """A loaded model, how it generates, and its system message: of the run, unless another is asked for."""

    engine: ChatEngine
    generating: GeneratingArguments
    default_system: str | None


def load_chat(target: str, overrides: Sequence[str] = ()) -> Chat:
    """Load what ``target`` names: a run folder, or any value that ``model_name_or_path`` takes.

    Args:
        target: run folder, model folder, hub id or ``builtin:...``.
        overrides: ``key=value`` settings; for a run they win over its ``config.yaml``. A plain model takes ``template``, too.

    Raises:
        CheckpointError: a run folder without a finished result.
        ModelError, ConfigError: as from loading.
    """
    quiet_library()
    device = pick_device()
    run = Path(target)
    asked = [override.partition("=")[0] for override in overrides]
    refused = TRAINING_KEYS if (run / CONFIG).is_file() else TRAINING_KEYS - {"template"}
    if useless := [key for key in asked if key in refused]:
        raise ConfigError(f"{', '.join(useless)}: settings of training; chat takes those of the model and of generation")
    if not (run / CONFIG).is_file():
        model_args, data, generating = load_model_settings(target, overrides)
        plain, tokenizer = load_pretrained(model_args)
        for note in use_template(tokenizer, data.template):
            log.warning(note)
        return _chat(plain, tokenizer, data, generating, data.template_date)
    if not is_finished(run):
        raise CheckpointError(f"{run}: the run has not finished; go on with resume_from_checkpoint=auto")
    config, _ = load_config(run / CONFIG, overrides)
    model_args = config.model
    if "trust_remote_code" not in asked:  # a run folder may come from elsewhere; its word is not the user's
        model_args = model_args.model_copy(update={"trust_remote_code": False})
    tokenizer = read_tokenizer(str(run))
    tuned = load_tuned(run, model_args, tokenizer, resolve_dtype(config.compute_dtype, device), device)
    day = config.data.template_date if "template_date" in asked else None  # the run's own day is over
    return _chat(tuned, tokenizer, config.data, config.generating, day)


def _chat(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: DataArguments,
    generating: GeneratingArguments,
    day: str | None,
) -> Chat:
    for sentence in no_effect(tokenizer, data.template_options):
        log.warning(sentence)
    return Chat(ChatEngine(model, tokenizer, day, data.template_options), generating, data.default_system)


def load_tuned(
    run: Path, args: ModelArguments, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, device: torch.device
) -> torch.nn.Module:
    """The result of a run: its adapter on the base model, or its own weights. Raises ModelError."""
    if (run / ADAPTER_CONFIG).is_file():
        line = line_of(args := without_contained(args, run))
        base = load_base_model(line.on(args), dtype, device, tokenizer)
        line.put_weights(base)
        return load_finished(base, run)
    return load_base_model(args.model_copy(update={"model_name_or_path": str(run)}), dtype, device, tokenizer)


def answer_once(chat: Chat, prompt: str) -> None:
    """Stream one answer to standard output."""
    _stream(chat, [*_opening(chat.default_system), Message("user", prompt)])


def talk(chat: Chat) -> None:
    """Read, answer, repeat, until /exit or the end of input."""
    system = chat.default_system
    messages = _opening(system)
    interactive = sys.stdin.isatty()
    if interactive:
        print(_HELP)
    while (text := _read("> " if interactive else "")) is not None:
        command, _, rest = text.partition(" ")
        if not text:
            continue
        if command in ("/exit", "/quit"):
            return
        if command == "/clear":
            messages = _opening(system)
        elif command == "/system":
            system = rest or None
            messages = _opening(system)
        elif command == "/help":
            print(_HELP)
        else:
            messages = _turn(chat, messages, text)


def _turn(chat: Chat, messages: list[Message], text: str) -> list[Message]:
    asked = [*messages, Message("user", text)]
    try:
        return [*asked, Message("assistant", _stream(chat, asked))]
    except KeyboardInterrupt:
        print("\n(stopped; the turn is forgotten)")
    except ModelError as error:
        print(error)
    return messages


def _opening(system: str | None) -> list[Message]:
    return [Message("system", system)] if system else []


def _read(prompt: str) -> str | None:
    try:
        return input(prompt).strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def _stream(chat: Chat, messages: list[Message]) -> str:
    pieces = []
    stream = chat.engine.stream(messages, chat.generating)
    try:
        for piece in stream:
            print(piece, end="", flush=True)
            pieces.append(piece)
    finally:
        stream.close()  # type: ignore[attr-defined]
    print()
    return "".join(pieces)

"""Talk to a run, or to a plain model, in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tunesmith.config.arguments import GeneratingArguments, ModelArguments
from tunesmith.config.load import RawConfig, load_generating, read_file
from tunesmith.errors import CheckpointError, ModelError
from tunesmith.generate.engine import ChatEngine
from tunesmith.model.adapter import ADAPTER_CONFIG, load_finished
from tunesmith.model.library import quiet_library
from tunesmith.model.load import load_base_model, load_tokenizer
from tunesmith.model.precision import DTYPES, multiplies_bf16, pick_device
from tunesmith.train.runfolder import CONFIG, is_finished
from tunesmith.types import Message

_HELP = "/clear forgets the conversation, /system TEXT sets the system message, /exit ends (Ctrl-D too)"


@dataclass(frozen=True)
class Chat:
    """A loaded model, how it generates, and the system message it was trained with."""

    engine: ChatEngine
    generating: GeneratingArguments
    default_system: str | None


def load_chat(target: str, overrides: Sequence[str] = ()) -> Chat:
    """Load what ``target`` names: a run folder, or any value that ``model_name_or_path`` takes.

    Args:
        target: run folder, model folder, hub id or ``builtin:...``.
        overrides: ``key=value`` changes of the generation settings.

    Raises:
        CheckpointError: a run folder without a finished result.
        ModelError, ConfigError: as from loading.
    """
    quiet_library()
    run = Path(target)
    saved: dict[str, object] = {}
    if (run / CONFIG).is_file():
        raw = RawConfig()
        read_file(run / CONFIG, raw)
        saved = raw.values
        if not is_finished(run):
            raise CheckpointError(f"{run}: the run has not finished; go on with resume_from_checkpoint=auto")
    generating = load_generating(saved, overrides)
    known = {key: value for key, value in saved.items() if key in ModelArguments.model_fields}
    adapted = (run / ADAPTER_CONFIG).is_file()
    base = ModelArguments.model_validate(
        {**known, "model_name_or_path": saved["model_name_or_path"] if adapted and saved else target}
    )
    device = pick_device()
    dtype = DTYPES.get(base.compute_dtype) or (torch.bfloat16 if multiplies_bf16(device) else torch.float32)
    plain = load_base_model(base, dtype, device)
    model: torch.nn.Module = plain
    if adapted:
        if not saved:
            raise ModelError(f"{run}: an adapter without {CONFIG}; its base model is not known")
        model = load_finished(plain, run)
    tokenizer = load_tokenizer(base.model_copy(update={"model_name_or_path": target}) if saved else base)
    system = saved.get("default_system")
    return Chat(ChatEngine(model, tokenizer), generating, str(system) if system is not None else None)


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

"""A Modelfile for Ollama, with a template in Go's syntax where the chat template can be said in it and the two agree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

MODELFILE = "Modelfile"
_USER, _ANSWER, _SYSTEM = "\ue000u", "\ue000a", "\ue000s"
_Turns = list[dict[str, str]]


@dataclass(frozen=True)
class Pieces:
    """What a template writes around the texts of a conversation; ``default`` stands where there is no system message."""

    default: str
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]

    def render(self, turns: _Turns) -> str:
        """The prompt for the next answer, as Ollama would make it from ``go``."""
        text = "" if turns[0]["role"] == "system" else self.default
        for turn in turns:
            before, after = getattr(self, turn["role"])
            text += before + turn["content"] + after
        return text + self.assistant[0]

    def go(self) -> str:
        """The same as a Go template."""
        told = f"{{{{ if not .System }}}}{self.default}{{{{ end }}}}" if self.default else ""
        told += "{{ range .Messages }}"
        for number, role in enumerate(("system", "user", "assistant")):
            before, after = getattr(self, role)
            told += f'{{{{ {"else if" if number else "if"} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
        return told + "{{ end }}{{ end }}" + self.assistant[0]


def pieces_of(tokenizer: PreTrainedTokenizerBase) -> Pieces | None:
    """Take a chat template apart; None where conversations are not the pieces and texts one after the other."""

    def text(turns: _Turns, prompt: bool) -> str:
        told = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt))
        return told.removeprefix(tokenizer.bos_token or "")  # Ollama writes it itself

    user, answer, system = _turn("user", _USER), _turn("assistant", _ANSWER), _turn("system", _SYSTEM)
    try:
        start, _, user_end = text([user], False).partition(_USER)
        prompted = text([user], True).partition(_USER)[2]
        answered = text([user, answer], False).partition(_ANSWER)[2]
        again = text([user, answer, user], False)
        between = again[again.find(_ANSWER) + len(_ANSWER) : again.rfind(_USER)]
        system_start, _, rest = text([system, user], False).partition(_SYSTEM)
    except (jinja2.TemplateError, ValueError, TypeError):
        return None
    user_start, system_end = between.removeprefix(answered), rest.partition(_USER)[0]
    if not (between.startswith(answered) and prompted.startswith(user_end) and start.endswith(user_start)):
        return None
    if not system_end.endswith(user_start) or _SYSTEM in rest:
        return None
    pieces = Pieces(
        default=start.removesuffix(user_start),
        system=(system_start, system_end.removesuffix(user_start)),
        user=(user_start, user_end),
        assistant=(prompted.removeprefix(user_end), answered),
    )
    written = pieces.default + "".join((*pieces.system, *pieces.user, *pieces.assistant))
    if "{{" in written or '"""' in written:
        return None
    return pieces if all(pieces.render(turns) == text(turns, True) for turns in _conversations()) else None


def _turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def _conversations() -> Iterator[_Turns]:
    """Conversations that begin with and without a system message, of one to three questions."""
    for opening in ([], [_turn("system", "Be brief.\nBe kind.")]):
        for questions in (1, 2, 3):
            turns: _Turns = list(opening)
            for number in range(questions):
                turns += [_turn("user", f"Question {number}?\n\n你好"), _turn("assistant", f"Answer {number}.\n- a list")]
            yield turns[:-1]


def modelfile(
    tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], sampling: dict[str, Any], weights: str = "."
) -> tuple[str, bool]:
    """Text of the Modelfile, and whether it has a template.

    Args:
        tokenizer: with or without a chat template.
        ends: ids of the tokens at which an answer ends.
        sampling: ``temperature``, ``top_p``, ``top_k``, where they are set.
        weights: folder or file of the weights, from where the Modelfile is.
    """
    lines = [f"FROM {weights}", ""]
    pieces = pieces_of(tokenizer) if tokenizer.chat_template else None
    if pieces is not None:
        lines += [f'TEMPLATE """{pieces.go()}"""', ""]
    elif tokenizer.chat_template:
        lines += ["# The chat template cannot be said in Go's syntax; Ollama is left to find it in the model's files.", ""]
    else:
        lines += ["# The model has no chat template.", 'TEMPLATE """{{ .Prompt }}"""', ""]
    stops = [str(tokenizer.convert_ids_to_tokens(end)) for end in ends]
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if not set(stop) & set('"\\\n')]
    lines += [f"PARAMETER {name} {value}" for name, value in sampling.items()]
    return "\n".join(lines) + "\n", pieces is not None

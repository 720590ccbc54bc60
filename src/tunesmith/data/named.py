"""Chat templates by name, and how one is put on a tokenizer.

A template is data: ``templates/NAME.jinja`` and an entry of ``templates/index.json``. Its first lines say how a turn
ends and, for forms that any base model can learn, how a text begins; these two lines are what ``fitted`` changes where
the tokenizer at hand has not got the tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from tunesmith.data.dialogue import Engine
from tunesmith.data.words import common_length
from tunesmith.errors import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AUTO = "auto"
"""The tokenizer's own template."""

_FOLDER = files("tunesmith.data") / "templates"
_KEYS = {"description", "source", "end", "special", "system"}
_MAX_BYTES = 1 << 20
_SHOWN = 40
_END = re.compile(r"^\{%- set end_of_turn = (.+?) -%\}$", re.MULTILINE)
_BEGIN = re.compile(r"^\{%- set begin_of_text = bos_token -%\}$", re.MULTILINE)
_PROBES: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("one turn", (("user", "Hello."), ("assistant", "Good day."))),
    ("two turns", (("user", "Hello."), ("assistant", "Good day."), ("user", "Well?"), ("assistant", "Yes."))),
    ("a system message", (("system", "Be brief."), ("user", "Hello."), ("assistant", "Good day."))),
)
"""Conversations in which a template is compared with the model's own."""


@dataclass(frozen=True, slots=True)
class NamedTemplate:
    """A chat template that comes with the package.

    Attributes:
        name: by which it is asked for.
        source: the Jinja text.
        description: one line.
        family: the models or projects whose form it is.
        end: the token that ends a reply; empty: the tokenizer's own end-of-sequence token.
        special: tokens that it writes and that a tokenizer should have as single ones.
        system: the system message that it writes where a conversation has none; empty: none.
    """

    name: str
    source: str
    description: str
    family: str
    end: str
    special: tuple[str, ...]
    system: str


@cache
def _index() -> Mapping[str, Mapping[str, Any]]:
    entries: dict[str, dict[str, Any]] = json.loads((_FOLDER / "index.json").read_text(encoding="utf-8"))
    for name, entry in entries.items():
        if entry.keys() - {"same_as"} != _KEYS:
            raise TemplateError(f"templates/index.json: {name!r} has the keys {sorted(entry)}, expected {sorted(_KEYS)}")
    return entries


def template_names() -> tuple[str, ...]:
    """Names that ``get_template`` knows, sorted."""
    return tuple(sorted(_index()))


def templates() -> tuple[NamedTemplate, ...]:
    """All of them, sorted by name."""
    return tuple(get_template(name) for name in template_names())


def get_template(name: str) -> NamedTemplate:
    """The template of that name. Raises TemplateError when there is none; names the nearest."""
    if name not in _index():
        near = get_close_matches(name, template_names(), 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise TemplateError(f"no template is named {name!r}; {hint}`tunesmith templates` lists the names")
    entry = _index()[name]
    source = (_FOLDER / f"{entry.get('same_as', name)}.jinja").read_text(encoding="utf-8")
    return NamedTemplate(
        name, source, entry["description"], entry["source"], entry["end"], tuple(entry["special"]), entry["system"]
    )


def use_template(tokenizer: PreTrainedTokenizerBase, choice: str) -> tuple[str, ...]:
    """Make a template the tokenizer's own, so that training, chat and the saved tokenizer all render with it.

    Args:
        tokenizer: of the model; its ``chat_template`` is changed.
        choice: ``auto`` for what it has, a name, or the path of a ``.jinja`` file.

    Returns:
        What a person should know: tokens that the tokenizer has not got, replies that chat cannot see the end of, how the
        model's own template differs.

    Raises:
        TemplateError: no such name or file, or a form that needs an end-of-sequence token where there is none.
    """
    if choice == AUTO:
        return ()
    is_file = choice.endswith(".jinja")
    source, notes = (read_template(Path(choice)), []) if is_file else fitted(get_template(choice), tokenizer)
    notes += _endless(tokenizer, source, choice) if is_file else []
    note = f"template {choice!r} {_compared(tokenizer, source)}"
    tokenizer.chat_template = source
    return *notes, note


def read_template(path: Path) -> str:
    """The text of a template file. Raises TemplateError when there is none, or it is too long or not UTF-8."""
    if not path.is_file():
        raise TemplateError(f"template: no such file: {path}")
    if path.stat().st_size > _MAX_BYTES:
        raise TemplateError(f"template: {path} has {path.stat().st_size:,} bytes; a template has at most {_MAX_BYTES:,}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TemplateError(f"template: {path} is not UTF-8 (byte {error.start}); save the file as UTF-8") from None


# ---- a template and a tokenizer


def fitted(template: NamedTemplate, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[str]]:
    """The template's text for one tokenizer, and what a person should know.

    A reply has to end with one token that generation can stop at. Where the template's end of a turn is no single
    token, the tokenizer's end-of-sequence token is written behind it. A token that begins texts is written by the
    forms for base models only where the tokenizer puts it before plain text, too.

    Raises:
        TemplateError: an end-of-sequence token is needed and the tokenizer has none.
    """
    known = tokenizer.get_added_vocab()
    source = template.source
    notes: list[str] = []
    unknown = [token for token in template.special if token not in known]
    if unknown:
        counts = [f"{token!r} is {len(tokenizer.encode(token, add_special_tokens=False))}" for token in unknown]
        notes.append(f"template {template.name!r}: {', '.join(counts)} ordinary tokens in this tokenizer")
    if template.end not in known:
        if tokenizer.eos_token is None:
            raise TemplateError(
                f"template {template.name!r} ends replies with an end-of-sequence token, and the tokenizer of "
                f"{tokenizer.name_or_path!r} has none; set eos_token in its tokenizer_config.json"
            )
        if template.end:
            source = _END.sub(r"{%- set end_of_turn = \1 ~ eos_token -%}", source, count=1)
            notes.append(f"template {template.name!r}: replies end with {template.end + tokenizer.eos_token!r}")
    if tokenizer.bos_token_id not in tokenizer.encode("a")[:1]:
        source = _BEGIN.sub("{%- set begin_of_text = '' -%}", source, count=1)
    return source, notes


def _endless(tokenizer: PreTrainedTokenizerBase, source: str, choice: str) -> list[str]:
    """A sentence if no single token comes between a reply and the next question."""
    _, turns = _PROBES[1]
    reply, next_question = turns[1][1], turns[2][1]
    text = _rendered(_engine(tokenizer, source), turns)
    if text is None or reply not in text:
        return []
    ending = text.partition(reply)[2].partition(next_question)[0]
    if any(token in ending for token in tokenizer.get_added_vocab() if token != tokenizer.bos_token):
        return []
    return [
        f"template {choice!r}: a reply is followed by {ending!r}, in which is no single token of this tokenizer, so generation "
        f"cannot stop there; write eos_token ({tokenizer.eos_token!r}) behind replies"
    ]


def _compared(tokenizer: PreTrainedTokenizerBase, source: str) -> str:
    """How a template and the tokenizer's own differ, as the end of a sentence."""
    if not tokenizer.chat_template:
        return "is used; the model has none of its own"
    engines = [_engine(tokenizer, text) for text in (tokenizer.get_chat_template(), source)]
    for what, turns in _PROBES:
        own, new = (_rendered(engine, turns) for engine in engines)
        if own == new:
            continue
        if own is None or new is None:
            return f"shows {what}, the model's own refuses it" if own is None else f"refuses {what}, the model's own shows it"
        place = common_length(own, new)
        begin = max(place - _SHOWN // 4, 0)
        a, b = (repr(text[begin : begin + _SHOWN]) for text in (new, own))
        return f"differs from the model's own: {a} where that has {b} (character {place + 1}, {what})"
    return "renders as the model's own"


def _engine(tokenizer: PreTrainedTokenizerBase, source: str) -> Engine:
    try:
        return Engine(source, None, {"documents": None, **tokenizer.special_tokens_map})
    except (jinja2.TemplateError, ValueError) as error:
        raise TemplateError(f"the chat template cannot be read: {error}") from None


def _rendered(engine: Engine, turns: tuple[tuple[str, str], ...]) -> str | None:
    """A conversation as text; None where the template refuses it."""
    try:
        return engine.plain([{"role": role, "content": content} for role, content in turns], None, False)
    except TemplateError:
        return None

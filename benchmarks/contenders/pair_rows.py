"""Preference pairs in the sharegpt form, as conversations."""

from __future__ import annotations

from typing import Any

Messages = list[dict[str, str]]
_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}


def conversations(row: dict[str, Any]) -> tuple[Messages, Messages, Messages]:
    """(prompt, better answer, worse answer)."""
    return _messages(row["conversations"]), _messages([row["chosen"]]), _messages([row["rejected"]])


def _messages(turns: list[dict[str, str]]) -> Messages:
    return [{"role": _ROLES[turn["from"]], "content": turn["value"]} for turn in turns]

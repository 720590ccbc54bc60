"""A ``tokenizer.model`` (SentencePiece) for a ``tokenizer.json`` that was made from one.

llama.cpp's converter reads the vocabulary of such models from ``tokenizer.model``, which transformers 5 no longer writes. Its
fall-back, where it has one, gives every token the same score, and llama.cpp then joins characters in another order than in
training. So the file is made again for the conversion: pieces, types, and scores that fall with the rank of the merge.

The layout is that of ``sentencepiece_model.proto`` (ModelProto: 1 pieces, 2 trainer, 3 normalizer).
"""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

TOKENIZER_MODEL = "tokenizer.model"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_BPE = 2


def sentencepiece_model(tokenizer: dict[str, Any]) -> bytes | None:
    """The file's content; None where the tokenizer was not made from SentencePiece.

    Args:
        tokenizer: content of a ``tokenizer.json``.
    """
    model = tokenizer["model"]
    if model.get("type") != "BPE" or not model.get("byte_fallback") or model.get("unk_token") is None:
        return None
    added = {token["id"]: token for token in tokenizer["added_tokens"]}
    names = {number: name for name, number in model["vocab"].items()} | {n: token["content"] for n, token in added.items()}
    if sorted(names) != list(range(len(names))):
        return None
    pairs = (pair if isinstance(pair, list) else pair.split(" ", 1) for pair in model["merges"])
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(pairs):
        ranks.setdefault(left + right, rank)
    pieces, unknown = b"", 0
    for number in range(len(names)):
        name = names[number]
        kind = _kind(name, model["unk_token"], added.get(number))
        unknown = number if kind == _UNKNOWN else unknown
        score = -float(ranks.get(name, len(ranks) + number)) if kind == _NORMAL else 0.0
        pieces += _field(1, _field(1, name.encode()) + _field(2, score) + _field(3, kind))
    trainer = _field(3, _BPE) + _field(4, len(names)) + _field(35, 1) + _field(40, unknown)
    normalizer = _field(1, b"identity") + _field(3, int(prepends_space(tokenizer))) + _field(4, 0) + _field(5, 1)
    return pieces + _field(2, trainer) + _field(3, normalizer)


def _kind(name: str, unknown: str, added: dict[str, Any] | None) -> int:
    if name == unknown:
        return _UNKNOWN
    if added is not None:
        return _CONTROL if added["special"] else _USER_DEFINED
    return _BYTE if re.fullmatch(r"<0x[0-9A-F]{2}>", name) else _NORMAL


def prepends_space(tokenizer: dict[str, Any]) -> bool:
    """Whether a space is put before a text."""

    def steps(step: Any) -> list[dict[str, Any]]:
        nested = step.get("normalizers") or step.get("pretokenizers") if step else []
        return [step, *(inner for each in nested for inner in steps(each))] if nested else [step] if step else []

    return any(
        step["type"] == "Prepend" or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in (*steps(tokenizer["normalizer"]), *steps(tokenizer["pre_tokenizer"]))
    )


def _field(number: int, value: int | float | bytes) -> bytes:
    """One field of a protocol buffer: a number, a float32, or bytes."""
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(number: int) -> bytes:
    out = b""
    while number > 0x7F:
        out += bytes([number & 0x7F | 0x80])
        number >>= 7
    return out + bytes([number])


def write_tokenizer_model(folder: Path) -> Path | None:
    """Write it beside the ``tokenizer.json`` of a folder that lacks it; returns the file if one was written."""
    source, target = folder / "tokenizer.json", folder / TOKENIZER_MODEL
    if target.exists() or not source.is_file():
        return None
    content = sentencepiece_model(json.loads(source.read_text(encoding="utf-8")))
    if content is None:
        return None
    target.write_bytes(content)
    return target

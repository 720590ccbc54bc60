"""Whether a ``.safetensors`` file is whole and says the truth about itself; only its header is read.

Layout (safetensors' format description): eight bytes, the length N of the header, little-endian; N bytes of JSON,
``{name: {dtype, shape, data_offsets: [begin, end]}}``; the tensors, end to end, without gaps.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from tunesmith.errors import ModelError

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_LONGEST_HEADER = 100_000_000
"""The format's own limit."""
_FOREIGN = {
    b"PK\x03\x04": "a zip archive, as torch.save writes (pickle inside)",
    b"GGUF": "a GGUF file",
    b"version ": "a Git LFS pointer, not the weights: run `git lfs pull` in the folder it came from",
}


@dataclass(frozen=True)
class Stored:
    """One tensor of a file, as its header describes it."""

    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, Stored]:
    """Name -> what is stored, of a file that is whole.

    Raises:
        ModelError: not a safetensors file, cut off, or a header that contradicts itself or the file's size.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise ModelError(_not_a_header(path, start, size))
            text = file.read(length)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        header = json.loads(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise ModelError(_damaged(path, f"its header is not valid JSON: {error}")) from None
    if not isinstance(header, dict):
        raise ModelError(_damaged(path, "its header is not a JSON object"))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ModelError(_damaged(path, "__metadata__ is not a mapping of texts"))
    places: list[tuple[int, int, str]] = []
    stored = {}
    for name, entry in header.items():
        stored[name], begin, end = _read_entry(path, name, entry)
        places.append((begin, end, name))
    _check_places(path, sorted(places), size - 8 - length)
    return stored


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is given twice")
    return found


def _not_a_header(path: Path, start: bytes, size: int) -> str:
    if start[:1] == b"\x80" or start.startswith((b"cos\n", b"cposix\n", b"(")):
        return f"{path}: holds a pickle under the name of safetensors; pickles can run code and are never loaded"
    for magic, what in _FOREIGN.items():
        if start.startswith(magic):
            return f"{path}: is no safetensors file but {what}"
    length = int.from_bytes(start, "little")
    return _damaged(path, f"says that its header has {length:,} bytes, the file has {size:,}")


def _damaged(path: Path, what: str) -> str:
    return f"{path}: a damaged or cut-off safetensors file: {what}; fetch or copy it again"


def _read_entry(path: Path, name: str, entry: Any) -> tuple[Stored, int, int]:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise ModelError(_damaged(path, f"{name}: expected dtype, shape and data_offsets, found {str(entry)[:80]}")) from None
    if dtype not in _BITS:
        raise ModelError(_damaged(path, f"{name}: unknown dtype {str(dtype)[:20]!r}"))
    numbers = [*shape, begin, end] if isinstance(shape, list) else [None]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ModelError(_damaged(path, f"{name}: shape {str(shape)[:60]} and offsets {begin}, {end} are no counts"))
    bits = prod(shape) * _BITS[dtype]
    if bits % 8 or end - begin != bits // 8:
        raise ModelError(
            _damaged(path, f"{name}: shape {shape} of {dtype} takes {bits / 8:g} bytes, its offsets span {end - begin}")
        )
    return Stored(dtype, tuple(shape)), begin, end


def _check_places(path: Path, places: list[tuple[int, int, str]], room: int) -> None:
    at = 0
    for begin, end, name in places:
        if begin != at:
            what = "overlaps the tensor before it" if begin < at else "leaves a gap before it"
            raise ModelError(_damaged(path, f"{name} {what} (begins at byte {begin:,}, expected {at:,})"))
        at = end
    if at != room:
        raise ModelError(_damaged(path, f"its tensors take {at:,} bytes, the file has {room:,}"))

"""A text file as blocks of bytes: unpacked, without a byte-order mark, its encoding checked; and cut into lines."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

from tunesmith.data.problem import RowProblem
from tunesmith.errors import DataError

BLOCK = 1 << 18
"""Bytes handed on at a time."""
MAX_ROW = 64 << 20
"""Longest row that is read, in bytes; a longer one is refused."""
BOMB_FLOOR = 1 << 30
BOMB_RATIO = 200
"""A packed file may grow to ``BOMB_FLOOR`` bytes, or to ``BOMB_RATIO`` times its size where that is more."""

_HEAD = 1 << 16
_PACKED_BLOCK = 1 << 10  # a packed byte may stand for 32 KiB: a small block keeps what one step unpacks below 32 MiB
_BOM = b"\xef\xbb\xbf"
_FOREIGN_MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_HAN_BYTES = range(0xA1, 0xFF)


def read_blocks(path: Path) -> Iterator[bytes]:
    """The bytes of a text file, ``.gz`` and ``.zst`` unpacked, without a UTF-8 byte-order mark.

    Raises:
        DataError: the file cannot be opened or unpacked, unpacks to far more than text does, or is UTF-16, UTF-32 or
            GBK (found from the first 64 KiB).
    """
    blocks = _unpacked(path)
    head = b""
    while len(head) < _HEAD and (block := next(blocks, b"")):
        head += block
    _check_encoding(path, head[:_HEAD])
    return chain((head.removeprefix(_BOM),), blocks)


def split_lines(blocks: Iterator[bytes]) -> Iterator[bytes | None]:
    """Lines without their line feed; None in place of one longer than ``MAX_ROW``, which is not kept in memory."""
    parts: list[bytes] = []
    held = 0
    for block in blocks:
        first, *others = block.split(b"\n")
        held += len(first)
        if held <= MAX_ROW:
            parts.append(first)
        else:
            parts.clear()
        if others:
            yield b"".join(parts) if held <= MAX_ROW else None
            last = others.pop()
            yield from others
            parts, held = [last], len(last)
    if held:
        yield b"".join(parts) if held <= MAX_ROW else None


def decode(data: bytes) -> str:
    """UTF-8 bytes as text.

    Raises:
        RowProblem: ``not-utf8``, its column counted in bytes; ``nul-character``.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte 0x{data[error.start]:02x} is not UTF-8 (column counted in bytes)"
        raise RowProblem("not-utf8", found, "save the file as UTF-8", error.start + 1, unreadable=True) from None
    if "\0" in text:
        fix = "remove the NUL character; the file may be damaged"
        raise RowProblem("nul-character", "a NUL character", fix, text.index("\0") + 1, unreadable=True)
    return text


def too_long() -> RowProblem:
    """The problem of a row that is longer than ``MAX_ROW``."""
    fix = "split the row; if it is meant to be many rows, give each its own line"
    return RowProblem("row-too-long", f"longer than {MAX_ROW >> 20} MiB, the most that one row may be", fix, unreadable=True)


# ---- unpacking


def _unpacked(path: Path) -> Iterator[bytes]:
    suffix = path.suffix.lower()
    try:
        if suffix in _UNPACK:
            yield from _guarded(path, _UNPACK[suffix](path))
        else:
            with path.open("rb") as file:
                while block := file.read(BLOCK):
                    yield block
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged {suffix} file: {error}. Fetch or pack it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _guarded(path: Path, blocks: Iterator[bytes]) -> Iterator[bytes]:
    limit = max(BOMB_FLOOR, BOMB_RATIO * path.stat().st_size)
    grown = 0
    for block in blocks:
        grown += len(block)
        if grown > limit:
            raise DataError(
                f"{path}: unpacks to more than {limit:,} bytes, {BOMB_RATIO} times its size; text does not pack that "
                "well. If the file is genuine, unpack it yourself and give the unpacked file"
            )
        yield block


def _gunzip(path: Path) -> Iterator[bytes]:
    with gzip.open(path, "rb") as file:
        while block := file.read(BLOCK):
            yield block


def _unzstd(path: Path) -> Iterator[bytes]:
    import zstandard

    # Not stream_reader: it takes a file that was cut off for a complete one.
    unpacker = zstandard.ZstdDecompressor().decompressobj()
    inside = False
    try:
        with path.open("rb") as file:
            while packed := file.read(_PACKED_BLOCK):
                while packed:
                    if block := unpacker.decompress(packed):
                        yield block
                    packed, inside = (unpacker.unused_data, False) if unpacker.eof else (b"", True)
                    if not inside:
                        unpacker = zstandard.ZstdDecompressor().decompressobj()
    except zstandard.ZstdError as error:
        raise DataError(f"{path}: damaged .zst file: {error}. Fetch or pack it again") from None
    if inside:
        raise DataError(f"{path}: damaged .zst file: it ends too early. Fetch or pack it again")


_UNPACK: dict[str, Callable[[Path], Iterator[bytes]]] = {".gz": _gunzip, ".zst": _unzstd}
PACKED = tuple(_UNPACK)
"""Endings of packed text files."""


# ---- encodings


def _check_encoding(path: Path, head: bytes) -> None:
    for mark, name in _FOREIGN_MARKS.items():
        if head.startswith(mark):
            raise _wrong_encoding(path, name, name)
    even, odd = head[::2].count(0), head[1::2].count(0)
    most, least = max(even, odd), min(even, odd)
    if most > 2 and most > 20 * least and 10 * most > len(head) // 2:
        raise _wrong_encoding(path, "UTF-16", "UTF-16LE" if odd > even else "UTF-16BE")
    if _looks_like_gbk(head):
        raise _wrong_encoding(path, "GBK", "GB18030")


def _wrong_encoding(path: Path, name: str, source: str) -> DataError:
    return DataError(
        f"{path}: looks like {name}, expected UTF-8; convert it: iconv -f {source} -t UTF-8 {path.name} > utf8-{path.name}"
    )


def _looks_like_gbk(head: bytes) -> bool:
    """Whether most lines beyond ASCII are no UTF-8 and read as Chinese in GB18030."""
    lines = [line for line in head.split(b"\n") if not line.isascii()]
    if len(head) == _HEAD and len(lines) > 1:
        lines.pop()  # its end may lie beyond the head
    foreign = [line for line in lines if not _decodes(line, "utf-8", len(head) == _HEAD)]
    if not foreign or 2 * len(foreign) <= len(lines):
        return False
    pairs = han = 0
    for line in foreign:
        if not _decodes(line, "gb18030", len(head) == _HEAD):
            return False
        for character in line.decode("gb18030", "ignore"):
            if character > "\x7f":
                pairs += 1
                packed = character.encode("gb18030")
                han += len(packed) == 2 and packed[0] in _HAN_BYTES and packed[1] in _HAN_BYTES
    return han * 5 >= pairs * 4  # a Latin letter beside an ASCII one also makes a pair, but an uncommon one


def _decodes(line: bytes, encoding: str, cut: bool) -> bool:
    try:
        line.decode(encoding)
    except UnicodeDecodeError as error:
        return cut and error.end == len(line)
    return True

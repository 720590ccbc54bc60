"""What trained weights lie on beside their base, kept beside them, so that they are not used without it or with it twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from tunesmith.data.source import file_sha
from tunesmith.errors import ModelError
from tunesmith.model.files import read_json

ORIGIN = "origin.json"


@dataclass(frozen=True)
class Part:
    """Trained weights in a folder.

    Attributes:
        folder: where they were.
        sha256: ``fingerprint`` of it.
    """

    folder: str
    sha256: str


@dataclass(frozen=True)
class Origin:
    """What weights were trained on.

    Attributes:
        needs: what has to be put into the base before them, in order.
        contains: earlier adapters that they are a continuation of, or the sum with.
    """

    needs: tuple[Part, ...] = ()
    contains: tuple[Part, ...] = ()


def fingerprint(folder: Path) -> str:
    """SHA-256 of the weights in a folder."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(f"{file.name} {file_sha(file)}".encode())
    return digest.hexdigest()


def part(folder: Path) -> Part:
    """The weights of a folder."""
    return Part(str(folder), fingerprint(folder))


def set_origin(model: torch.nn.Module, saved: Origin, finished: Origin) -> None:
    """Note on the model what its weights lie on: as checkpoints hold them, and as the finished run does."""
    model.__dict__["_tunesmith_origin"] = (saved, finished)


def write_origin(model: torch.nn.Module, folder: Path, finished: bool) -> None:
    """Write what ``set_origin`` was given beside the weights; nothing where they lie on the base alone."""
    saved, result = model.__dict__.get("_tunesmith_origin", (Origin(), Origin()))
    origin = result if finished else saved
    if origin != Origin():
        (folder / ORIGIN).write_text(json.dumps(asdict(origin), indent=2) + "\n", encoding="utf-8")


def read_origin(folder: Path) -> Origin:
    """What the weights of a folder lie on. Raises ModelError when the file cannot be read."""
    path = folder / ORIGIN
    if not path.is_file():
        return Origin()
    values = read_json(path)
    try:
        needs, contains = (
            tuple(Part(str(e["folder"]), str(e["sha256"])) for e in values[key]) for key in ("needs", "contains")
        )
    except (KeyError, TypeError):
        raise ModelError(f"{path}: expected needs and contains, lists of folder and sha256; copy the folder again") from None
    return Origin(needs, contains)


def check_alone(folder: Path, key: str) -> None:
    """Raise ModelError where the weights of a folder cannot be put on their base without what was trained before them."""
    if needs := read_origin(folder).needs:
        raise ModelError(
            f"{key}: {folder} was trained on top of {_names(needs)} and fits no base without; name the first base as "
            f"model_name_or_path, and {_names(needs)},{folder} as checkpoint_dir"
        )


def check_order(folders: Sequence[Path]) -> None:
    """Hold what each of several trained folders, put on a base in order, lies on against those before it.

    Raises:
        ModelError: something is missing before it, in another order, or is in it already.
    """
    before: list[Part] = []
    for folder in folders:
        origin, this = read_origin(folder), part(folder)
        hashes = [one.sha256 for one in before]
        if origin.needs and hashes != [need.sha256 for need in origin.needs]:
            raise ModelError(
                f"checkpoint_dir: {folder} was trained on top of {_names(origin.needs)}; name just that before it, or, of an "
                "adapter, the finished run, which holds all"
            )
        if twice := [one for one in before if one.sha256 in {inner.sha256 for inner in origin.contains}]:
            raise ModelError(f"checkpoint_dir: {folder} contains {_names(twice)} already; name {folder} alone")
        before.append(this)


def _names(parts: Sequence[Part]) -> str:
    return ",".join(one.folder for one in parts)

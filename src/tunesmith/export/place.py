"""An export is complete or invisible: written aside, checked, flushed, then put in place; files of others stay."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tunesmith.data.source import file_sha
from tunesmith.errors import ConfigError
from tunesmith.train.checkpoint import flush, write_json

MANIFEST = "export.json"
_FORMAT = 1
_PACKAGES = ("tunesmith", "torch", "transformers", "peft", "safetensors")


def claim(target: Path, overwrite: bool, sources: Sequence[Path]) -> Path:
    """Check that an export may be written to ``target``; nothing is changed.

    Args:
        target: the output folder.
        overwrite: whether an earlier export there is replaced.
        sources: folders that are read, and must not be written into.

    Returns:
        The folder beside it to write into first.

    Raises:
        ConfigError: it is a file, one of the sources, or holds something.
    """
    if target.exists() and not target.is_dir():
        raise ConfigError(f"--output: {target} is a file; give a folder")
    for source in sources:
        if target.resolve() == source.resolve() or target.resolve() in source.resolve().parents:
            raise ConfigError(f"--output: {target} holds what is exported ({source}); give another folder")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        state = "an earlier export" if own_files(target) else "files that no export made"
        raise ConfigError(f"--output: {target} holds {state}; give another folder, or --overwrite, which removes only what an "
                          "export made")  # fmt: skip
    return target.with_name(f".{target.name}.partial")


def own_files(target: Path) -> list[str]:
    """Names of the files that an export wrote into a folder; none where there was no export."""
    try:
        manifest = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"] if manifest.get("made_by") == "tunesmith" else {}
        return [name for name in files if not Path(name).is_absolute() and ".." not in Path(name).parts]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def check_space(target: Path, needed: int) -> None:
    """Raise ConfigError when the disk of ``target`` has no room for ``needed`` bytes."""
    existing = next(path for path in (target, *target.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ConfigError(
            f"--output: {target} needs {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free; free some, or give "
            "another folder, or --dtype bf16"
        )


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Write ``export.json``: ``facts``, versions, and size and SHA-256 of every other file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    write_json(
        folder / MANIFEST,
        {
            "format": _FORMAT,
            "made_by": "tunesmith",
            **facts,
            "versions": {name: version(name) for name in _PACKAGES},
            "files": {
                path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha(path)} for path in files
            },
        },
    )


def put_in_place(scratch: Path, target: Path) -> None:
    """Flush what was written and move it to ``target``; of an earlier export there, only its own files are removed.

    Raises:
        ConfigError: a file there has the name of a new one, and no export made it; nothing was changed.
    """
    new = sorted(path.relative_to(scratch) for path in scratch.rglob("*") if path.is_file())
    for name in new:
        flush(scratch / name)
    flush(scratch)
    old = own_files(target)
    foreign = [name for name in new if (target / name).exists() and name.as_posix() not in (*old, MANIFEST)]
    if foreign:
        raise ConfigError(f"--output: {target / foreign[0]} was not made by an export and would be overwritten")
    if old:  # without its manifest, what is left of an export that was cut off here is not taken for one
        (target / MANIFEST).unlink()
    for gone in old:
        (target / gone).unlink(missing_ok=True)
    if target.is_dir() and not any(target.iterdir()):
        target.rmdir()
    if not target.exists():
        scratch.rename(target)
    else:
        for name in [*(name for name in new if name.as_posix() != MANIFEST), Path(MANIFEST)]:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (scratch / name).replace(target / name)
        shutil.rmtree(scratch)
        flush(target)
    flush(target.parent)

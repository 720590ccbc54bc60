"""Raw rows of a data set, from wherever it lies, each with its place."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tunesmith.config.arguments import DatasetAttr
from tunesmith.data import hub
from tunesmith.data.files import folder_files, read_file
from tunesmith.data.json_rows import Item
from tunesmith.data.problem import BadRow, RowProblem
from tunesmith.data.registry import check_file_name
from tunesmith.data.repository import PREFIX
from tunesmith.errors import DataError
from tunesmith.types import Source

_Part = tuple[str, Callable[[int], Iterator[Item | None]]]


class RawRow(NamedTuple):
    """A row as the file has it.

    Attributes:
        columns: name -> value.
        source: where it stands.
    """

    columns: dict[str, Any]
    source: Source


def read_rows(attr: DatasetAttr, dataset_dir: str, skip: int = 0, limit: int | None = None) -> Iterator[RawRow | BadRow]:
    """Rows of a data set, one after the other; memory does not grow with their number.

    The files are looked up, checked and, from a hub, fetched at the call; they are read as the rows are taken.

    Args:
        attr: the data set.
        dataset_dir: what ``file_name`` is relative to.
        skip: that many rows are passed over, unparsed where the format allows it; later rows keep their numbers.
        limit: rows of which the last one given is the ``limit``-th of the set, the skipped and the bad ones counted.

    Returns:
        An iterator; ``BadRow`` for a row that cannot be read.

    Raises:
        DataError: the set cannot be read at all: missing, outside ``dataset_dir``, wrong hash, wrong encoding, a broken
            JSON array, a damaged file, no rows. Some of these show only when the rows are taken.
    """
    layout = _layout(attr, dataset_dir)
    files = _checked_files(attr, dataset_dir, layout)
    parts: list[_Part] = [(str(file), partial(read_file, file)) for file in files]
    if layout is not None:
        parts = [(layout.label, layout.rows)]
    return _label_rows(attr, parts, skip, limit)


def data_files(attr: DatasetAttr, dataset_dir: str) -> list[Path]:
    """The files behind a data set, in the order in which they are read. A hub set is fetched.

    Raises:
        DataError: missing, outside ``dataset_dir``, wrong hash, or a folder that cannot be read.
    """
    return _checked_files(attr, dataset_dir, _layout(attr, dataset_dir))


def file_sha(path: Path, algorithm: str = "sha256") -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


# ---- rows with their places


def _label_rows(attr: DatasetAttr, parts: Sequence[_Part], skip: int, limit: int | None) -> Iterator[RawRow | BadRow]:
    passed = 0
    if limit is not None and limit <= skip:
        return
    for file, read in parts:
        for row, item in enumerate(read(max(skip - passed, 0)), 1):
            passed += 1
            if item is not None:
                line, content = item
                source = Source(attr.dataset_name, file, row, line)
                yield BadRow(source, content) if isinstance(content, RowProblem) else RawRow(content, source)
            if passed == limit:
                return
    if not passed:
        raise DataError(f"data set {attr.dataset_name!r}: {parts[0][0]} holds no rows; give a file with at least one")


# ---- files


def _layout(attr: DatasetAttr, dataset_dir: str) -> hub.Layout | None:
    """The set as ``datasets`` sees it: one of a hub, or a folder of which a split, subset or inner folder is asked for."""
    if attr.load_from != "file":
        return hub.open_layout(hub.fetch(attr), attr, f"{PREFIX[attr.load_from]}{attr.hub_url}")
    path = _locate(attr, dataset_dir)
    saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    asked = attr.subset or attr.folder or "split" in attr.model_fields_set
    return hub.open_layout(path, attr, str(path)) if path.is_dir() and asked and not saved else None


def _checked_files(attr: DatasetAttr, dataset_dir: str, layout: hub.Layout | None) -> list[Path]:
    if layout is not None:
        files = layout.files
    else:
        path = _locate(attr, dataset_dir)
        files = folder_files(path, attr.split) if path.is_dir() else [path]
        if attr.subset or attr.folder or (attr.split != "train" and not path.is_dir()):
            raise DataError(
                f"data set {attr.dataset_name!r}: {path} has no subset, split or folder to choose from; remove these keys"
            )
        for file in files:
            _check_inside(attr, file, dataset_dir)
    _check_hashes(attr, files)
    return files


def _locate(attr: DatasetAttr, dataset_dir: str) -> Path:
    """The file or folder that the set names."""
    if attr.file_name is None:
        raise DataError(f"data set {attr.dataset_name!r}: names no file; set file_name")
    if not attr.inline:
        check_file_name(attr.file_name, f"data set {attr.dataset_name!r}")
    path = Path(attr.file_name) if attr.inline else Path(dataset_dir) / attr.file_name
    _check_inside(attr, path, dataset_dir)
    if not path.exists():
        raise DataError(f"data set {attr.dataset_name!r}: no such file or folder: {path}; correct file_name or dataset_dir")
    if not path.is_file() and not path.is_dir():
        raise DataError(f"data set {attr.dataset_name!r}: {path} is neither a file nor a folder; copy its content to a file")
    return path


def _check_inside(attr: DatasetAttr, path: Path, dataset_dir: str) -> None:
    if not attr.inline and not path.resolve().is_relative_to(Path(dataset_dir).resolve()):
        raise DataError(
            f"data set {attr.dataset_name!r}: {path} is a link that leaves dataset_dir {dataset_dir!r}; expected a file inside "
            "it. To read a file from elsewhere, give its path as dataset in the configuration"
        )


def _check_hashes(attr: DatasetAttr, files: Sequence[Path]) -> None:
    for algorithm, wanted in (("sha1", attr.dataset_sha1), ("sha256", attr.dataset_sha256)):
        if wanted is None:
            continue
        if len(files) != 1:
            raise DataError(
                f"data set {attr.dataset_name!r}: has {len(files)} files, but dataset_{algorithm} is the hash of one; remove it"
            )
        found = file_sha(files[0], algorithm)
        if found != wanted.lower():
            raise DataError(
                f"{files[0]}: its {algorithm} is {found}, but dataset_info.json says {wanted.lower()}; "
                "fetch the file again, or correct the hash if the change is meant"
            )

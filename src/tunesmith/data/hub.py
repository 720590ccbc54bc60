"""Data sets of a hub: fetched as plain data files, then read by ``datasets`` from disk. No code of a set is run."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import yaml

from tunesmith.config.arguments import DatasetAttr
from tunesmith.data import repository
from tunesmith.data.files import ending
from tunesmith.data.json_rows import Item
from tunesmith.data.repository import NotFetched, Repository, first_line
from tunesmith.data.table_rows import batch_rows
from tunesmith.errors import DataError

_ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".parquet", ".arrow")
_PATTERNS = [f"*{kind}{packed}" for kind in _ENDINGS for packed in ("", ".gz", ".zst")]
_READERS = ("json", "csv", "text", "parquet", "arrow")
_CARDS = ("README.md", ".huggingface.yaml")
_BATCH = 1000


# ---- fetching


def fetch(attr: DatasetAttr) -> Path:
    """Download the data files and the card of a hub set to the hub client's own cache, or find them there.

    ``HF_ENDPOINT``, ``HF_HUB_OFFLINE`` and ``HF_TOKEN`` are obeyed.

    Returns:
        The folder that holds them.

    Raises:
        DataError: no such set or revision, no access, no connection; says what else can be done.
    """
    name = attr.hub_url or ""
    hub: Literal["hf_hub", "ms_hub"] = "hf_hub" if attr.load_from == "hf_hub" else "ms_hub"
    inside = f"{_inner_folder(attr)}/" if attr.folder else ""
    patterns = ["README.md", *(inside + pattern for pattern in _PATTERNS)]
    try:
        return repository.fetch(Repository(hub, name, "dataset", attr.revision), patterns)
    except NotFetched as error:
        raise DataError(f"{error}.\n{_ways_on(name)}") from None


def _inner_folder(attr: DatasetAttr) -> str:
    folder = PurePosixPath(attr.folder or "")
    if folder.is_absolute() or ".." in folder.parts or "://" in str(attr.folder) or "\\" in str(attr.folder):
        raise DataError(f"data set {attr.dataset_name!r}: folder {attr.folder!r} leaves the set; expected a path inside it")
    return str(folder)


def _ways_on(name: str) -> str:
    return (
        "Ways on: set HF_ENDPOINT to a mirror of the hub that you can reach; or take the set from ModelScope under its name "
        f"there (ms:{name}, or ms_hub_url in dataset_info.json); or fetch its files by other means and give their path"
    )


# ---- reading


@dataclass(frozen=True)
class Layout:
    """One split of a set as ``datasets`` finds it in a folder.

    Attributes:
        label: what rows name as their file.
        files: the files of the split.
        rows: its rows from a number on; None for each one passed over.
    """

    label: str
    files: list[Path]
    rows: Callable[[int], Iterator[Item | None]]


def open_layout(folder: Path, attr: DatasetAttr, name: str) -> Layout:
    """Find a set's subset and split in a folder, by its card or by the names of its files.

    Args:
        folder: local; nothing is fetched.
        attr: with subset, split and inner folder.
        name: of the set, for messages and labels.

    Raises:
        DataError: no such subset or split (with those that exist), no data files, files outside the folder, or of a kind
            that would run code.
    """
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        raise DataError(f"{name}: was written by save_to_disk; fetch it and give the folder's path as dataset")
    _check_cards(folder, name)
    with _quiet() as datasets:
        builder = _find_builder(datasets, folder, attr, name)
        found = {str(split): list(files) for split, files in (builder.config.data_files or {}).items()}
    reader = type(builder).__module__.rpartition(".")[2]
    if reader not in _READERS:
        raise DataError(f"{name}: holds files for the reader {reader!r}, not rows of text; read are {', '.join(_ENDINGS)}")
    wanted = [part.partition("[")[0].strip() for part in attr.split.split("+")]
    if missing := [split for split in wanted if split not in found]:
        raise DataError(f"{name}: no split {missing[0]!r}; it has {', '.join(found) or 'none'}")
    files = [Path(file) for split in dict.fromkeys(wanted) for file in found[split]]
    _check_files(folder, files, name)
    return Layout(f"{name}/{attr.split}", files, lambda skip: _read_split(builder, attr, name, skip))


def _find_builder(datasets: Any, folder: Path, attr: DatasetAttr, name: str) -> Any:
    inner = _inner_folder(attr) if attr.folder else None
    if inner and not (folder / inner).is_dir():
        there = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir())) or "none"
        raise DataError(f"{name}: no folder {attr.folder!r} with data files; folders are: {there}")
    try:
        return datasets.load_dataset_builder(str(folder), name=attr.subset, data_dir=inner)
    except (FileNotFoundError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{name}: holds no data files that are read ({', '.join(_ENDINGS)}): {first_line(error)}") from None
    except Exception as error:  # a card can trip the library in many ways
        names = _subsets(datasets, folder)
        if len(names) > 1 and attr.subset not in names:
            asked = f"no subset {attr.subset!r}" if attr.subset else "has several subsets"
            raise DataError(f"{name}: {asked}; set subset to one of: {', '.join(names)}") from None
        if attr.subset and names and attr.subset not in names:
            raise DataError(f"{name}: no subset {attr.subset!r}; it has only {names[0]!r}, so remove subset") from None
        raise DataError(
            f"{name}: what it holds cannot be made out: {first_line(error)}. Fetch its files and give a path as dataset"
        ) from None


def _subsets(datasets: Any, folder: Path) -> list[str]:
    try:
        return datasets.get_dataset_config_names(str(folder))
    except Exception:  # the error that is reported is the one that led here
        return []


def _read_split(builder: Any, attr: DatasetAttr, name: str, skip: int) -> Iterator[Item | None]:
    with _quiet() as datasets:
        try:
            builder.download_and_prepare()
            rows = builder.as_dataset(split=attr.split)
        except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
            raise DataError(
                f"{name}: its files cannot be read: {first_line(error.__cause__ or error)}. To find the row, fetch the file "
                "and give its path as dataset: then the line is named"
            ) from None
    yield from batch_rows(rows.with_format("arrow").iter(batch_size=_BATCH), skip)


@contextmanager
def _quiet() -> Iterator[Any]:
    """``datasets`` without progress bars and without a count of loads sent to the hub."""
    import datasets

    shown = not datasets.utils.are_progress_bars_disabled()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    datasets.utils.disable_progress_bars()
    try:
        yield datasets
    finally:
        if shown:
            datasets.utils.enable_progress_bars()


# ---- nothing outside the folder, nothing but rows


def _check_cards(folder: Path, name: str) -> None:
    """Refuse a card whose patterns for data files point elsewhere, before ``datasets`` follows them."""
    for card in _CARDS:
        if not (folder / card).is_file():
            continue
        text = (folder / card).read_text(encoding="utf-8", errors="replace")
        if card == "README.md":
            found = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---", text, re.DOTALL)
            text = found[1] if found else ""
        try:
            described = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise DataError(f"{name}: the header of {card} is not valid YAML: {first_line(error)}") from None
        configs = described.get("configs") if isinstance(described, dict) else None
        for pattern in _texts([[c.get("data_files"), c.get("data_dir")] for c in configs or () if isinstance(c, dict)]):
            path = PurePosixPath(pattern)
            if "://" in pattern or "::" in pattern or "\\" in pattern or path.is_absolute() or {"..", "~"} & set(path.parts):
                raise DataError(f"{name}: {card} names data files outside the set: {pattern!r}; refused")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _texts(list(value.values()))
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _check_files(folder: Path, files: list[Path], name: str) -> None:
    root = folder.resolve()
    store = root.parent.parent  # of the hub's cache: snapshots/<commit>/<file> is a link to blobs/<hash>
    kept = store / "blobs" if root.parent.name == "snapshots" else root
    for file in files:
        inside = file.is_relative_to(folder) or file.is_relative_to(root)
        target = file.resolve()
        if not inside or not (target.is_relative_to(root) or target.is_relative_to(kept)):
            raise DataError(f"{name}: {file} lies outside the set; refused")
        if not ending(file):
            raise DataError(f"{name}: {file.name} is no file of rows; read are {', '.join(_ENDINGS)}")

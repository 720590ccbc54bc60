"""Fetches a repository of a hub, of data or of a model, into the hub client's own cache. No code of it is run."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

PREFIX = {"hf_hub": "hf:", "ms_hub": "ms:"}
"""How the configuration and messages name a repository of each hub."""
HUB_NAME = re.compile(r"(?!.*\.\.)[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)
"""Name of a repository."""


class NotFetched(Exception):
    """Why a repository could not be fetched, as one sentence without a full stop."""


@dataclass(frozen=True)
class Repository:
    """What is fetched.

    Attributes:
        hub: which one.
        name: ``org/name``.
        kind: of what is in it.
        revision: branch, tag or commit; the hub's main one if None.
        cache_dir: where downloads are kept; the client's own place if None.
        token: True: the stored token must be sent; False: never; None: if there is one.
    """

    hub: Literal["hf_hub", "ms_hub"]
    name: str
    kind: Literal["dataset", "model"]
    revision: str | None = None
    cache_dir: str | None = None
    token: bool | None = None

    def __str__(self) -> str:
        return PREFIX[self.hub] + self.name + (f"@{self.revision}" if self.revision else "")

    @property
    def noun(self) -> str:
        """What messages call it."""
        return "data set" if self.kind == "dataset" else "model"


def prefers_modelscope() -> bool:
    """Whether ``USE_MODELSCOPE_HUB`` asks for ModelScope where a name does not say which hub it is of."""
    return os.environ.get("USE_MODELSCOPE_HUB", "").lower() in ("1", "true", "yes", "y")


def fetch(repository: Repository, wanted: Sequence[str], unwanted: Sequence[str] = ()) -> Path:
    """Download files of a repository, or find them in the cache; what an interrupted download left is gone on from.

    ``HF_ENDPOINT``, ``HF_HUB_OFFLINE`` and ``HF_TOKEN`` are obeyed.

    Args:
        repository: which.
        wanted: patterns of file names.
        unwanted: patterns of those left out all the same.

    Returns:
        The folder that holds them.

    Raises:
        NotFetched: no such repository or revision, no access, no connection, no client.
    """
    if not HUB_NAME.fullmatch(repository.name):
        raise NotFetched(f"{repository}: {repository.name!r} is no name on a hub; expected org/name")
    get = _from_hf if repository.hub == "hf_hub" else _from_modelscope
    return Path(get(repository, list(wanted), list(unwanted)))


def _from_hf(repository: Repository, wanted: list[str], unwanted: list[str]) -> str:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return huggingface_hub.snapshot_download(
            repository.name,
            repo_type=repository.kind,
            revision=repository.revision,
            cache_dir=repository.cache_dir,
            token=repository.token,
            allow_patterns=wanted,
            ignore_patterns=unwanted,
        )
    except errors.GatedRepoError:
        reason = "its owner lets only people in who accepted the terms; accept them on its page and set HF_TOKEN"
    except errors.RevisionNotFoundError:
        reason = f"has no revision {repository.revision!r}; give a branch, tag or commit that exists"
    except errors.RepositoryNotFoundError:
        reason = f"there is no such {repository.noun}, or it is private and HF_TOKEN is not set; check the spelling"
    except errors.LocalTokenNotFoundError:
        reason = "use_auth_token: true, but no token is stored; set HF_TOKEN, or remove the key"
    except errors.LocalEntryNotFoundError as error:
        offline = huggingface_hub.constants.HF_HUB_OFFLINE
        reason = "not in the cache, and HF_HUB_OFFLINE is set" if offline else f"the hub cannot be reached: {first_line(error)}"
    except Exception as error:  # failures of the transport have no public class
        reason = f"cannot be fetched: {first_line(error)}"
    raise NotFetched(f"{repository}: {reason}")


def _from_modelscope(repository: Repository, wanted: list[str], unwanted: list[str]) -> str:
    try:
        import modelscope
    except ImportError:
        raise NotFetched(
            f'{repository}: {repository.noun}s of ModelScope need its client: pip install "tunesmith[modelscope]"'
        ) from None
    get = modelscope.dataset_snapshot_download if repository.kind == "dataset" else modelscope.snapshot_download
    options = {"cache_dir": repository.cache_dir, "ignore_patterns": unwanted}
    try:
        given = {key: value for key, value in options.items() if value}
        return get(repository.name, revision=repository.revision, allow_patterns=wanted, **given)
    except Exception as error:  # the client has no common error class
        raise NotFetched(f"{repository}: cannot be fetched: {first_line(error)}") from None


def first_line(error: BaseException) -> str:
    """Class and first line of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__

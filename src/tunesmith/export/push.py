"""Upload of an export to a model hub (``HF_ENDPOINT`` chooses it). The token is the one that the hub's library has stored."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi

from tunesmith.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_name(name: str) -> None:
    """Raise ConfigError unless ``name`` is like ``org/name``."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"--push: {name!r} is no name of a repository; give ORG/NAME")


def push(folder: Path, name: str, private: bool) -> str:
    """Upload every file of an export, in one commit; returns the address of the repository.

    Raises:
        ConfigError: the hub refuses, or cannot be reached. The export on disk stays.
    """
    check_name(name)
    api = HfApi()
    try:
        address = api.create_repo(name, private=private, exist_ok=True, repo_type="model")
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload of tunesmith export")
    except Exception as error:  # failures of the transport have no public class
        reason = str(error).strip().splitlines()
        raise ConfigError(
            f"--push: {name}: the hub did not take it: {reason[0] if reason else type(error).__name__}. Log in with "
            f"`hf auth login`; {folder} is complete and can be uploaded later"
        ) from error
    return str(address)

"""Where things that can be made again are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """``$TUNESMITH_HOME``, else ``$XDG_CACHE_HOME/tunesmith``, else ``~/.cache/tunesmith``."""
    if home := os.environ.get("TUNESMITH_HOME"):
        return Path(home)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tunesmith"


def data_cache() -> Path:
    """Where tokenised data are kept: ``$TUNESMITH_DATA_CACHE``, else ``data`` in the cache. May be deleted at any time."""
    if folder := os.environ.get("TUNESMITH_DATA_CACHE"):
        return Path(folder)
    return cache_root() / "data"

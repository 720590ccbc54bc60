"""Models of a hub: configuration, tokenizer and safetensors are fetched; pickles never, code only if it may run."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from tunesmith.config.arguments import ModelArguments
from tunesmith.data import repository
from tunesmith.data.repository import PREFIX, NotFetched, Repository, prefers_modelscope
from tunesmith.errors import ModelError

_SMALL = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
_ELSEWHERE = ("*/*", "consolidated*")
"""Copies of the weights in other formats, which many repositories hold too."""


def repository_of(name: str, args: ModelArguments) -> Repository:
    """The repository that ``org/name``, ``hf:org/name`` or ``ms:org/name`` means."""
    modelscope = name.startswith(PREFIX["ms_hub"]) or (not name.startswith(PREFIX["hf_hub"]) and prefers_modelscope())
    bare = name.removeprefix(PREFIX["ms_hub"]).removeprefix(PREFIX["hf_hub"])
    if modelscope:
        revision = None if args.model_revision == "main" else args.model_revision  # there the main branch is named otherwise
        return Repository("ms_hub", bare, "model", revision, args.cache_dir)
    return Repository("hf_hub", bare, "model", args.model_revision, args.cache_dir, args.use_auth_token)


@lru_cache(maxsize=16)
def fetch(source: Repository, code: bool, weights: bool) -> Path:
    """Folder of a model, in the hub client's cache; one process sees one commit of it.

    Args:
        source: which.
        code: whether Python files are wanted.
        weights: False: configuration and tokenizer do.

    Raises:
        ModelError: as the hub's answer says, with other ways on.
    """
    wanted = [*_SMALL, *(["*.safetensors"] if weights else []), *(["*.py"] if code else [])]
    try:
        return repository.fetch(source, wanted, _ELSEWHERE)
    except NotFetched as error:
        raise ModelError(
            f"model_name_or_path: {error}.\nWays on: set HF_ENDPOINT to a mirror of the hub that you can reach; or take the "
            f"model from ModelScope under its name there (ms:{source.name}); or fetch its files by other means and give their "
            "folder; or use builtin:smollm2-135m. What has been fetched is kept: starting again goes on from there"
        ) from None

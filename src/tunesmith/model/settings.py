"""The configuration of a model as transformers reads it, and what to say when the library refuses a file."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from tunesmith.errors import ModelError


def read_settings(folder: str | Path, trusted: bool) -> PreTrainedConfig:
    """``config.json`` of a model folder.

    Args:
        folder: of the model.
        trusted: whether Python code beside it may run.

    Raises:
        ModelError: it cannot be read, or has values that fit no model.
    """
    try:
        settings: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
    except Exception as error:  # each kind of model has checks of its own
        raise library_error("configuration", folder, error) from error
    return settings


def positions(settings: PreTrainedConfig) -> int | None:
    """Tokens of a row that a model was made for; None where its configuration does not say."""
    found = getattr(settings.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) else None


def library_error(what: str, path: str | Path, error: Exception) -> ModelError:
    """What went wrong when the library loaded something, in a line."""
    if "trust_remote_code" in str(error):
        return ModelError(
            f"cannot load the {what} of {path}: it comes as Python code beside the weights, which is not run; if you have read "
            "it, set trust_remote_code: true (it holds for model_name_or_path alone), or --trust-remote-code when exporting"
        )
    said = [line.strip() for line in str(error).strip().splitlines()]
    reason = said[0] if said else type(error).__name__
    if reason.endswith(":") and len(said) > 1:
        reason = f"{reason} {said[1]}"
    return ModelError(f"cannot load the {what} of {path}: {reason}")

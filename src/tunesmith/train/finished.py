"""What a finished run, or an adapter from elsewhere, consists of: base, adapter or whole model, tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from tunesmith.config.arguments import ModelArguments, RunConfig
from tunesmith.config.load import load_config
from tunesmith.errors import CheckpointError, ConfigError, ModelError
from tunesmith.model.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from tunesmith.model.lineage import line_of, without_contained
from tunesmith.model.origin import check_alone
from tunesmith.model.tokenizer import load_tokenizer, read_tokenizer
from tunesmith.train.runfiles import CONFIG, is_finished


@dataclass(frozen=True)
class Finished:
    """A trained result.

    Attributes:
        folder: of the run, or of the adapter.
        base: how the model under the adapter is loaded, unquantised; None where the folder holds a whole model.
        weights: folders of weights that earlier ``freeze`` runs trained, which belong into the base.
        trained_on: how the base was quantised in training, if it was.
        config: of the run; None for an adapter from elsewhere.
        trusted: whether Python code beside the base, or the whole model, may run.
    """

    folder: Path
    base: ModelArguments | None
    weights: tuple[Path, ...]
    trained_on: ModelArguments | None
    config: RunConfig | None
    trusted: bool = False

    @property
    def is_adapter(self) -> bool:
        """Whether the result is an adapter, and not a whole model."""
        return self.base is not None


def open_finished(target: Path, base: str | None = None, trust_remote_code: bool = False) -> Finished:
    """Find out what a folder holds.

    Args:
        target: a run folder, or a folder with an adapter in PEFT's layout.
        base: model to use in place of the one that the run or the adapter names.
        trust_remote_code: whether code of ``base`` may run, or of a whole model in ``target``; never of a model that only the
            run names.

    Raises:
        ConfigError: code may run, but the user has not named the model.
        CheckpointError: no run, or one that has not finished.
        ModelError: weights in a format that can run code, or an adapter that names no base.
    """
    is_run = (target / CONFIG).is_file()
    adapter = (target / ADAPTER_CONFIG).is_file()
    if is_run and not is_finished(target):
        raise CheckpointError(f"{target}: the run has not finished; go on with resume_from_checkpoint=auto")
    if not is_run and not adapter:
        raise CheckpointError(f"{target}: neither a run folder ({CONFIG}) nor an adapter ({ADAPTER_CONFIG})")
    if adapter and not (target / ADAPTER_WEIGHTS).is_file():
        raise ModelError(f"{target}: no {ADAPTER_WEIGHTS}; weights in other formats can run code and are not loaded")
    config = load_config(target / CONFIG)[0] if is_run else None
    if not adapter:
        if base is not None:
            raise ModelError(f"--base: {target} holds a whole model; there is no base to choose")
        return Finished(target, None, (), None, config, trust_remote_code)
    named = base or (config.model.model_name_or_path if config is not None else _named_base(target))
    if trust_remote_code and base is None:
        raise ConfigError(
            f"--trust-remote-code: only of a model that you name; if you have read the code of {named}: --base {named}"
        )
    if config is None:
        check_alone(target, "RUN")
        plain = ModelArguments(model_name_or_path=named, trust_remote_code=trust_remote_code)
        return Finished(target, plain, (), None, None, trust_remote_code)
    return _of_run(target, config, base, trust_remote_code)


def _of_run(run: Path, config: RunConfig, base: str | None, trusted: bool) -> Finished:
    args = without_contained(config.model, run)
    line = line_of(args)
    source = line.on(args).model_copy(update={"trust_remote_code": trusted})  # a run's word is not the user's
    quantised = source if source.quantization_bit is not None else None
    plain = source.model_copy(update={"quantization_bit": None, **({"model_name_or_path": base} if base else {})})
    return Finished(run, plain, tuple(line.weights), quantised, config, trusted)


def _named_base(folder: Path) -> str:
    try:
        name = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        name = None
    if not isinstance(name, str) or not name:
        raise ModelError(f"{folder / ADAPTER_CONFIG}: base_model_name_or_path names no model; give it with --base")
    return name


def tokenizer_of(finished: Finished) -> PreTrainedTokenizerBase:
    """The tokenizer beside the result, or else that of the base. Raises ModelError."""
    if (finished.folder / "tokenizer_config.json").is_file() or finished.base is None:
        return read_tokenizer(str(finished.folder), finished.trusted and finished.base is None)
    return load_tokenizer(finished.base)

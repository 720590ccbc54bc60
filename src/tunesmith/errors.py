"""The one tree of errors. Every message says what was found, where, what was expected and what to do."""

from __future__ import annotations

from collections.abc import Sequence


class TunesmithError(Exception):
    """Base of every error that a user can cause and cure.

    Attributes:
        exit_code: the process exit status with which the command line ends.
    """

    exit_code = 2


class ConfigError(TunesmithError):
    """The configuration cannot be used; the message lists every problem at once.

    Attributes:
        problems: (where, key, message) of each, where the configuration itself was read.
    """

    def __init__(self, message: str, problems: Sequence[tuple[str, str, str]] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


class DataError(TunesmithError):
    """A data set, a data file or a row cannot be used; names file and row."""


class TemplateError(TunesmithError):
    """The chat template cannot render a conversation, or its loss mask cannot be derived."""


class ModelError(TunesmithError):
    """A model, tokenizer or adapter cannot be loaded or used as asked."""


class CheckpointError(TunesmithError):
    """A checkpoint or run folder is missing, damaged, or does not fit the configuration."""


class Interrupted(TunesmithError):
    """The run was asked to stop; a checkpoint was written first."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class StageError(TunesmithError):
    """A stage of a pipeline failed or was stopped; its exit status is kept."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class NonFiniteError(TunesmithError):
    """A loss or gradient is NaN or infinite; raised before the update that it would have spoiled."""

    exit_code = 1


class OutOfMemoryError(TunesmithError):
    """Memory does not suffice; names the batch and what to change."""

    exit_code = 1


class VerificationError(TunesmithError):
    """What was made does not do what it was made from; it was not put in place."""

    exit_code = 1

"""How loud transformers is."""

from __future__ import annotations

import warnings

from transformers.utils import logging as transformers_logging


def quiet_library() -> None:
    """Silence transformers' progress bars and chatter; errors still raise."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\..*")

"""A value head: one linear layer that reads a number off a hidden state. Its file, and scores of flat batches.

``value_head.safetensors`` lies beside the adapter or model that it belongs to and holds ``v_head.summary.weight`` ``[1, H]``
and ``v_head.summary.bias`` ``[1]``, float32: the names that TRL's models with value heads and LLaMA-Factory use, so that their
files are read here and ours there. The head of a sequence classifier (``score``) is read as one without a bias.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from tunesmith.errors import ModelError
from tunesmith.model.files import ADAPTER_WEIGHTS, CLASSIFIER_HEAD, VALUE_HEAD, read_head_header
from tunesmith.model.safetensors_file import Stored, read_header
from tunesmith.types import Batch

if TYPE_CHECKING:
    from tunesmith.model.forward import FlatForward

WEIGHT = "v_head.summary.weight"
BIAS = "v_head.summary.bias"
_FLOATS = ("F32", "F16", "BF16", "F64")


class ValueHead(torch.nn.Module):
    """Hidden state -> one number, in float32 whatever the model computes in.

    Starts at zero: every reward is exactly 0 and every pair's loss exactly ln 2, so a first log line tells whether a run is set
    up rightly, and a value head beside a policy sends no gradient into the trunk before it has learned something itself. The
    head's own gradient is the hidden state and not zero, so that it moves with the first update, and the trunk with the second.
    No dropout: a score must not depend on chance.

    Args:
        width: of the hidden states.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.summary = torch.nn.Linear(width, 1, dtype=torch.float32)
        torch.nn.init.zeros_(self.summary.weight)
        torch.nn.init.zeros_(self.summary.bias)

    @property
    def width(self) -> int:
        """Of the hidden states that it reads."""
        return self.summary.in_features

    def forward(self, hidden_PH: torch.Tensor) -> torch.Tensor:
        """Float32 ``[P]`` of hidden states ``[P, H]``; autocast has no effect."""
        with torch.autocast(hidden_PH.device.type, enabled=False):
            return self.summary(hidden_PH.float()).squeeze(-1)


def head_width(model: PreTrainedModel) -> int:
    """Width of the hidden states that a value head of this model reads."""
    output = model.get_output_embeddings()
    if isinstance(output, torch.nn.Linear):
        return output.in_features
    return int(model.config.get_text_config().hidden_size)


def row_ends(batch: Batch) -> torch.Tensor:
    """Where the last token of each row of a flat batch is: int64 ``[B]``, on the batch's device.

    Example:
        ``lengths = (3, 2)`` -> ``[2, 4]``.
    """
    return torch.tensor(batch.lengths, device=batch.input_ids_T.device).cumsum(0) - 1


def row_scores(forward: FlatForward, head: ValueHead, batch: Batch) -> torch.Tensor:
    """What the head reads at the last token of each row, float32 ``[B]``; no pad is ever looked at.

    Differentiable; callers choose autocast and ``no_grad``.
    """
    scores: torch.Tensor = head(forward.hidden(batch, row_ends(batch)))
    return scores


def token_values(forward: FlatForward, head: ValueHead, batch: Batch) -> torch.Tensor:
    """What the head reads where the batch has targets, float32 ``[S]``: the value before each supervised token is written."""
    values: torch.Tensor = head(forward.hidden(batch, batch.positions_S))
    return values


def head_parameters(head: ValueHead) -> dict[str, torch.nn.Parameter]:
    """Weight and bias by their names in the file."""
    return {f"v_head.{name}": parameter for name, parameter in head.named_parameters()}


# ---- the file


def save_value_head(head: ValueHead, folder: Path) -> None:
    """Write the head beside its model or adapter: whole, or not at all."""
    scratch = folder / f".{VALUE_HEAD}.partial"
    state = {name: tensor.detach().to("cpu").contiguous() for name, tensor in head_parameters(head).items()}
    try:
        save_file(state, scratch, metadata={"format": "pt"})
        with scratch.open("rb+") as file:
            os.fsync(file.fileno())
        scratch.replace(folder / VALUE_HEAD)
    finally:
        scratch.unlink(missing_ok=True)


def no_head(folder: Path) -> ModelError:
    """What to say of a reward model without a head."""
    return ModelError(
        f"{folder / VALUE_HEAD}: no such file, so nothing says how hidden states become a score, and a head made up here would "
        "score at random. Give the folder of a reward model that was saved with its head, or copy the file there: one linear "
        f"layer, {WEIGHT} [1, width] and {BIAS} [1]"
    )


def has_head(folder: Path) -> bool:
    """Whether a model or adapter comes with a head. Raises ModelError when it is a pickle, or damaged."""
    return _find(folder) is not None


def _find(folder: Path) -> tuple[Path, dict[str, str], dict[str, Stored]] | None:
    """The file of the head, name there -> name here, and what is stored: a file of its own, or part of an adapter's."""
    if (stored := read_head_header(folder)) is not None:
        return folder / VALUE_HEAD, {WEIGHT: WEIGHT, BIAS: BIAS}, stored
    adapter = folder / ADAPTER_WEIGHTS
    if adapter.is_file() and (weight := read_header(adapter).get(CLASSIFIER_HEAD)) is not None:
        return adapter, {CLASSIFIER_HEAD: WEIGHT}, {CLASSIFIER_HEAD: weight}
    return None


def starting_head(folders: Sequence[Path], width: int) -> ValueHead:
    """The head that training begins with: that of the last folder that has one, else a new one.

    Args:
        folders: of the base and of all that was trained on it, in order.
        width: of the model's hidden states.

    Raises:
        ModelError: as ``load_value_head``.
    """
    found = next((folder for folder in reversed(folders) if has_head(folder)), None)
    return ValueHead(width) if found is None else load_value_head(found, width)


def load_value_head(folder: Path, width: int) -> ValueHead:
    """The head of a model or adapter; of a sequence classifier's adapter as well, which has it among its own weights.

    Args:
        folder: of the model or adapter.
        width: of the model's hidden states.

    Raises:
        ModelError: there is none, it is a pickle or damaged, holds other tensors, is of another width, or is not finite.
    """
    found = _find(folder)
    if found is None:
        raise no_head(folder)
    path, names, stored = found
    for name, tensor in stored.items():
        if name not in names:
            raise ModelError(f"{path}: unexpected tensor {name}; expected {WEIGHT} and {BIAS}")
        expected = (1, width) if names[name] == WEIGHT else (1,)
        if tensor.shape != expected:
            raise ModelError(
                f"{path}: {name} has shape {list(tensor.shape)}, expected {list(expected)}; was it trained on another model?"
            )
        if tensor.dtype not in _FLOATS:
            raise ModelError(f"{path}: {name} is stored as {tensor.dtype}; expected numbers with a fraction, such as F32")
    if WEIGHT not in (names[name] for name in stored):
        raise ModelError(f"{path}: holds no {WEIGHT}")
    return _filled(ValueHead(width), _read(path, {name: names[name] for name in stored}), path)


def _read(path: Path, names: dict[str, str]) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return {ours: file.get_tensor(theirs) for theirs, ours in names.items()}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from None


@torch.no_grad()
def _filled(head: ValueHead, state: dict[str, torch.Tensor], path: Path) -> ValueHead:
    """The head with these weights; a bias that is not stored (TRL's newer heads have none) is 0."""
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise ModelError(f"{path}: {name} holds numbers that are not finite; the run that made it was spoiled")
        (head.summary.weight if name == WEIGHT else head.summary.bias).copy_(tensor)
    return head


def sequence_head(model: PreTrainedModel, where: Path) -> ValueHead:
    """The head of a sequence classifier with one label, as a value head.

    Raises:
        ModelError: its class does not read one number off the last hidden state with one linear layer.
    """
    score = getattr(model, "score", None)
    if not isinstance(score, torch.nn.Linear) or score.out_features != 1:
        raise ModelError(
            f"{where}: {type(model).__name__} cannot be read as a reward model; expected one label (num_labels: 1), which a "
            "linear layer named score reads off the last token. Call others from a function (reward_model_type: function)"
        )
    state = {WEIGHT: score.weight} if score.bias is None else {WEIGHT: score.weight, BIAS: score.bias}
    return _filled(ValueHead(score.in_features), state, where)

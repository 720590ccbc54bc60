"""What a model does between its last hidden states and its logits: found by trying, not by its name.

The output head gives ``z``; many models then scale it (Cohere, Granite), some bound it (Gemma 2). A probe puts numbers of our
own in the place of ``z`` and looks at the logits that the model makes of them; a second one compares all of it, hidden states
included, with the model's own logits. Only where both agree may losses be computed from hidden states and the head alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from transformers import PreTrainedModel

from tunesmith.errors import ModelError
from tunesmith.model.adapter import unwrap
from tunesmith.model.forward import FlatForward, probe_batch
from tunesmith.model.precision import autocast

_RANGE = 200.0
"""Numbers from minus to plus this are put in the place of the head's output, most of them near zero."""


@dataclass(frozen=True, slots=True)
class Output:
    """Logits from the head's output ``z``: ``scale z``, or ``softcap tanh(scale z / softcap)``.

    Attributes:
        scale: factor.
        softcap: bound; None: there is none.
    """

    scale: float = 1.0
    softcap: float | None = None

    def logits(self, z: torch.Tensor) -> torch.Tensor:
        """In float32, of the head's output in any shape."""
        scaled = z.float() * self.scale
        return scaled if self.softcap is None else torch.tanh(scaled / self.softcap) * self.softcap


def output_head(model: torch.nn.Module) -> torch.nn.Module:
    """The output head, adapted or not. Raises ModelError for a model that has none."""
    head = unwrap(model).get_output_embeddings()
    if not isinstance(head, torch.nn.Module):
        raise ModelError(f"{type(unwrap(model)).__name__}: the library does not tell the output head of this model")
    return head


def head_matrix(head: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Weight ``[V, H]`` and bias of a head that is a matrix and nothing else; None for an adapted, quantised or hooked one."""
    if type(head) is not torch.nn.Linear or head._forward_hooks or head._forward_pre_hooks:
        return None
    return head.weight, head.bias


def adds_nothing(model: torch.nn.Module) -> bool:
    """Whether a model does no more than its layers do: not so with virtual tokens, for one."""
    return not isinstance(model, PeftModel) or type(model.base_model).forward is BaseTuner.forward


@torch.no_grad()
def find_output(forward: FlatForward, dtype: torch.dtype) -> tuple[Output | None, str]:
    """How the model makes logits of hidden states, or None and why this is not known.

    Args:
        forward: the model as it is trained, adapters included; comes back as it was.
        dtype: that training computes in.
    """
    model = forward.model
    if not adds_nothing(model):
        return None, f"{type(model.base_model).__name__} does more than its layers do"
    training = model.training
    model.eval()
    try:
        with autocast(unwrap(model).device, dtype):
            return _try(forward, exact=dtype == torch.float32)
    except (ModelError, NotImplementedError, AttributeError, ValueError, TypeError, RuntimeError) as error:
        return None, str(error).splitlines()[0]
    finally:
        model.train(training)


def _try(forward: FlatForward, exact: bool) -> tuple[Output | None, str]:
    base = unwrap(forward.model)
    head, batch = output_head(forward.model), probe_batch(base)
    made: list[torch.Tensor] = []

    def replace(module: torch.nn.Module, inputs: Any, z: torch.Tensor) -> torch.Tensor:
        ramp = _RANGE * torch.linspace(-1, 1, z.shape[-1], device=z.device) ** 3
        made.append(ramp.to(z.dtype).expand_as(z))
        return made[-1]

    handle = head.register_forward_hook(replace)
    try:
        shaped = forward.logits(batch).float()
    finally:
        handle.remove()
    if len(made) != 1:
        return None, f"its output head runs {len(made)} times"
    ramp = made[0].reshape(-1, shaped.shape[-1])[: len(shaped)].float()
    near = 1e-4 if exact else 1e-2
    found = next((output for output in _candidates(base, ramp, shaped) if _differ(output.logits(ramp), shaped) <= near), None)
    if found is None:
        return None, "its logits are not those of its head, scaled or bounded"
    own = forward.logits(batch).float()
    ours = found.logits(head(forward.hidden(batch, batch.positions_S)))
    difference = _differ(torch.log_softmax(ours, -1), torch.log_softmax(own, -1))
    if not difference <= (1e-4 if exact else 5e-2):
        return None, f"its hidden states and head give other log-probabilities (relative difference {difference:.1e})"
    return found, ""


def _candidates(model: PreTrainedModel, ramp: torch.Tensor, shaped: torch.Tensor) -> Iterator[Output]:
    """Scales are 1, or numbers that the configuration has; which one, the logits say."""
    values = model.config.get_text_config().to_dict()
    numbers = [float(v) for v in values.values() if isinstance(v, int | float) and math.isfinite(v) and v]
    known = [1.0, *numbers, *(1 / number for number in numbers)]
    cap = values.get("final_logit_softcapping")
    for softcap in (None, cap) if cap else (None,):
        small = ramp.abs() <= min(1.0, _RANGE if softcap is None else softcap / 8)
        scale = ((shaped * ramp)[small].sum() / (ramp * ramp)[small].sum()).item()
        near = min(known, key=lambda number: abs(number - scale))
        if abs(near - scale) <= 1e-2 * abs(scale):
            yield Output(near, softcap)


def _differ(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest relative difference of a row; infinite where something is not a number."""
    difference = ((one - other).norm(dim=-1) / other.norm(dim=-1)).max().item()
    return difference if math.isfinite(difference) else math.inf

"""One frozen trunk in several roles: which of a model's adapters take part. Switching copies nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer


@contextmanager
def playing(model: PeftModel, *adapters: str) -> Iterator[None]:
    """Within the block these adapters take part and no others; with none, the bare trunk.

    Afterwards all is as it was. What receives gradients does not change at any time: an adapter that is frozen stays frozen
    while it plays. Blocks may be nested.

    Args:
        model: with these adapters, none of them merged.
        adapters: names in the model.
    """
    tuner = model.base_model
    before, off = list(tuner.active_adapters), _is_off(model)
    learning = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    try:
        _switch(model, list(adapters) or before, off=not adapters, learning=learning)
        yield
    finally:
        _switch(model, before, off, learning)


def _is_off(model: PeftModel) -> bool:
    return next((module.disable_adapters for module in model.modules() if isinstance(module, BaseTunerLayer)), False)


def _switch(model: PeftModel, adapters: list[str], off: bool, learning: set[int]) -> None:
    """The library sets what receives gradients with each switch; it is put back."""
    tuner = model.base_model
    if list(tuner.active_adapters) != adapters:
        tuner.set_adapter(adapters)
    if _is_off(model) != off:
        (tuner.disable_adapter_layers if off else tuner.enable_adapter_layers)()
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in learning)

"""Whether an adapter can be trained on its model, found by trying before anything is written."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel

from tunesmith.errors import ConfigError
from tunesmith.model.adapter import trainable_parameters, unwrap
from tunesmith.model.forward import FlatForward, probe_batch
from tunesmith.model.precision import autocast
from tunesmith.model.quantize import is_quantised

_FRESH = 0.5
"""Share of the probability that a new adapter may move (total variation); those that begin near zero move next to none."""


def try_adapter(forward: FlatForward, dtype: torch.dtype, base_logits: torch.Tensor | None) -> None:
    """Run a few tokens forward and backward, twice, as some layers break only after the first time; no weight is changed.

    Plain LoRA on a base of full precision, which is known to work, is not tried; nor is what is no adapter.

    Args:
        forward: the model as it is trained.
        dtype: that training computes in.
        base_logits: ``small_logits`` of a quantised base before it got a new adapter, which should change little; else None.

    Raises:
        ConfigError: it cannot be run, nothing of it is trained, or it takes the numbers of a quantised base for something else.
    """
    model = forward.model
    if not isinstance(model, PeftModel):
        return
    config = model.active_peft_config
    if isinstance(config, LoraConfig) and not is_quantised(unwrap(model)):
        return
    kind = str(getattr(config.peft_type, "value", config.peft_type)).lower()
    what = "use_dora" if getattr(config, "use_dora", False) else f"peft_method: {kind}"
    where = f"{type(unwrap(model)).__name__}{' with quantization_bit' if is_quantised(unwrap(model)) else ''}"
    batch, training, learned = probe_batch(unwrap(model)), model.training, list(trainable_parameters(model).values())
    if not learned:
        raise ConfigError(f"{what}: has nothing to train on {where}; give it other peft_args, or choose another method")
    model.eval()
    try:
        for _ in range(2):
            with autocast(batch.input_ids_T.device, dtype):
                total = forward.logits(batch).float().sum()
            torch.autograd.grad(total, learned, allow_unused=True)
    except Exception as error:  # whatever a method of the library, or a kernel under it, raises
        reason = str(error).strip().splitlines()
        raise ConfigError(
            f"{what}: cannot be trained on {where}: {type(error).__name__}: {reason[0] if reason else ''}; choose another "
            "method, or another quantisation"
        ) from error
    finally:
        model.train(training)
    if base_logits is not None:
        moved = small_logits(forward, dtype).softmax(-1) - base_logits.softmax(-1)
        change = moved.abs().sum(-1).mean().item() / 2
        if not change <= _FRESH:
            raise ConfigError(
                f"{what}: a new adapter moves {change:.0%} of the probability on {where}: the method does not know weights of "
                "few bits, or begins at random; choose another method, or remove quantization_bit"
            )


@torch.no_grad()
def small_logits(forward: FlatForward, dtype: torch.dtype) -> torch.Tensor:
    """Logits of a few tokens, in evaluation mode."""
    model, training = forward.model, forward.model.training
    batch = probe_batch(unwrap(model))
    model.eval()
    with autocast(batch.input_ids_T.device, dtype):
        logits = forward.logits(batch).float()
    model.train(training)
    return logits

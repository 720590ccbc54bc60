"""NEFTune (arXiv 2310.05914, algorithm 1): uniform noise on the embeddings of a model in training."""

from __future__ import annotations

from typing import Any

import torch


class EmbeddingNoise:
    """Adds ``alpha / sqrt(L d) * U(-1, 1)`` to each embedding, ``L`` the tokens of its own row and ``d`` the width.

    Only while the embedding is in training mode. The numbers come from torch's generator, which checkpoints hold.

    Args:
        embedding: the model's input embedding; its output is ``[B, T, d]``.
        alpha: strength.
    """

    def __init__(self, embedding: torch.nn.Module, alpha: float) -> None:
        self.alpha = alpha
        self.lengths: torch.Tensor | None = None
        """Tokens of the row of each position, ``[B, T]`` or what broadcasts to it; set before each forward pass."""
        embedding.register_forward_hook(self._add)

    def _add(self, module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if not module.training or self.lengths is None:
            return output
        bound = self.alpha / (self.lengths.to(output.device, torch.float32) * output.shape[-1]).sqrt()
        noise = torch.empty(output.shape, dtype=torch.float32, device=output.device).uniform_(-1, 1)
        return output + (noise * bound[..., None]).to(output.dtype)

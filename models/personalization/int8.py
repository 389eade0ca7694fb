"""A frozen base in 8 bits under an adapter (QLoRA's idea, Dettmers et al. 2023, arXiv:2305.14314, with plain int8): memory for time.

A linear layer [O, I] keeps whole numbers -127..127 and one scale a row, |w| max / 127, so that a weight is off by at most half a
scale; it is made whole again in each use. The adapter learns on top of what the layer then is; it is saved alone, and merged
into the base's own weights. Left out: 4 bits, double quantisation, paged optimizers, outliers kept apart (LLM.int8).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from models.engine.shard import blocks_of

LEVELS = 127


class Int8Linear(nn.Linear):
    """A frozen linear layer in 8 bits; its `weight` and its state_dict are what the numbers stand for."""

    codes: torch.Tensor
    scale: torch.Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        del self._parameters["weight"]
        self.bias = layer.bias
        with torch.no_grad():
            scale = layer.weight.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / LEVELS
            codes = (layer.weight / scale).round().to(torch.int8)
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """[O, I] float32."""
        return self.codes.to(self.scale.dtype) * self.scale

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight


def quantise(module: nn.Module) -> None:
    """Put every linear layer of every block in 8 bits, in place; ValueError where there is no block to find one in."""
    blocks = blocks_of(module)
    if not blocks:
        raise ValueError("lora.base: int8 is for the blocks of a transformer, this network has none; set it to fp32")
    for block in blocks:
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    setattr(parent, name, Int8Linear(child))

"""One more scalar for a student: LCM's guidance scale (arXiv:2310.04378, sec. 4.2) or MeanFlow's interval t - r.

Sinusoidal features of the scalar go through a linear layer that starts at zero and are added to the time embedding, so
the student starts equal to the teacher. For a fixed scalar the added vector is a constant and folds into the bias of
the time embedding exactly: the exported transformer is the stock one.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from models.networks.denoiser import Denoiser

SCALE = 100.0  # radians per unit at the highest frequency


class ScalarEmbedding(nn.Module):
    """A scalar [B] -> a vector [B, W] to be added to the time embedding; zero at the start."""

    def __init__(self, width: int, features: int = 64) -> None:
        super().__init__()
        self.features = features
        self.embed = nn.Linear(features, width)
        nn.init.zeros_(self.embed.weight)
        nn.init.zeros_(self.embed.bias)

    def forward(self, scalar: torch.Tensor) -> torch.Tensor:
        """cos and sin at frequencies from SCALE down to 1."""
        half = self.features // 2
        exponents = torch.arange(half, device=scalar.device, dtype=scalar.dtype) / (half - 1)
        angles = scalar[:, None] * torch.exp(exponents * -math.log(SCALE)) * SCALE
        return self.embed(torch.cat([angles.cos(), angles.sin()], 1))  # type: ignore[no-any-return]


class ConditionedDenoiser(nn.Module):
    """A denoiser that is also told a scalar."""

    def __init__(self, denoiser: Denoiser, embedding: ScalarEmbedding) -> None:
        super().__init__()
        self.denoiser, self.embedding = denoiser, embedding.to(denoiser.text_mean.device)

    def forward(
        self, x_t: torch.Tensor, t: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor, scalar: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `Denoiser`, with one scalar [B] a sample."""
        output: tuple[torch.Tensor, torch.Tensor | None]
        output = self.denoiser(x_t, t, tokens, mask, condition=self.embedding(scalar))
        return output

    @property
    def t_clamp(self) -> float:
        """The denoiser's."""
        return self.denoiser.t_clamp


@torch.no_grad()
def folded(denoiser: Denoiser, embedding: ScalarEmbedding, scalar: float) -> Denoiser:
    """The plain denoiser for one value of the scalar."""
    clone = copy.deepcopy(denoiser)
    bias = clone.time_bias
    bias.add_(embedding(bias.new_tensor([scalar]))[0])
    return clone

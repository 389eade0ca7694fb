"""The velocity that sampling follows, and the ODE to the picture: rollouts are drawn as at inference."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch

from models.engine.objective import Batch
from models.networks.prx import Denoiser, velocity_of
from models.pretraining.config import ShiftConfig
from models.pretraining.densities import shift_of
from models.sampling.euler import grid, guided_x_0

Null = tuple[torch.Tensor, torch.Tensor]  # the empty prompt's features [1, T, D] and mask [1, T]


@dataclass(frozen=True)
class Sampling:
    """How a checkpoint is sampled: the empty prompt, the guidance, the time shift of its card."""

    null: Null
    guidance: float
    timesteps: ShiftConfig = field(default_factory=ShiftConfig)
    patch_size: int = 4

    def times(self, steps: int, pictures: torch.Tensor) -> list[float]:
        """The grid of pictures [B, 3, H, W], from 1 to 0."""
        _, _, h, w = pictures.shape
        return grid(steps, shift_of(h * w // self.patch_size**2, self.timesteps))

    def x_0(self, net: Denoiser, x: torch.Tensor, t: float, asked: Batch) -> torch.Tensor:
        """The guided prediction, x_0 [B, 3, H, W]."""
        now = x.new_full((len(x),), t)
        return guided_x_0(net, x, now, asked.tokens, asked.mask, self.null, self.guidance)

    def velocity(self, net: Denoiser, x: torch.Tensor, t: float, asked: Batch) -> torch.Tensor:
        """The guided velocity at t, the pipeline's clamp included."""
        return velocity_of(self.x_0(net, x, t, asked), x, x.new_full((len(x),), t))

    def follow(self, net: Denoiser, x: torch.Tensor, times: list[float], asked: Batch) -> torch.Tensor:
        """Euler steps through `times`."""
        for t, s in pairwise(times):
            x = x + (s - t) * self.velocity(net, x, t, asked)
        return x

"""The velocity that sampling follows, and the ODE to the picture: rollouts are drawn as at inference."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from models.engine.objective import Batch
from models.networks.codec import Codec, Pixels
from models.networks.denoiser import Denoiser
from models.pretraining.config import ShiftConfig
from models.sampling.euler import guided_velocity, guided_x_0
from models.sampling.times import times_of

Null = tuple[torch.Tensor, torch.Tensor]  # the empty prompt's features [1, T, D] and mask [1, T]


@dataclass(frozen=True)
class Sampling:
    """How a checkpoint is sampled: the empty prompt, the guidance, the time shift or scheduler of its card, the codec."""

    null: Null
    guidance: float
    timesteps: ShiftConfig = field(default_factory=ShiftConfig)
    patch_size: int = 4
    codec: Codec = field(default_factory=Pixels)
    scheduler: dict[str, Any] | None = None

    def times(self, steps: int, pictures: torch.Tensor) -> list[float]:
        """The grid of pictures or latents [B, C, H, W], from 1 to 0."""
        _, _, h, w = pictures.shape
        return times_of(self.scheduler, self.timesteps, steps, h * w // self.patch_size**2)

    def pictures(self, x_0: torch.Tensor) -> torch.Tensor:
        """What a reward sees [B, 3, H, W] in [-1, 1] of drawn x_0 [B, C, h, w]."""
        return self.codec.pictures(x_0).clamp(-1, 1)

    def x_0(self, net: Denoiser, x: torch.Tensor, t: float, asked: Batch) -> torch.Tensor:
        """The guided prediction, x_0 [B, C, H, W]."""
        now = x.new_full((len(x),), t)
        return guided_x_0(net, x, now, asked.tokens, asked.mask, self.null, self.guidance)

    def velocity(self, net: Denoiser, x: torch.Tensor, t: float, asked: Batch) -> torch.Tensor:
        """The guided velocity at t, the pipeline's clamp included."""
        now = x.new_full((len(x),), t)
        return guided_velocity(net, x, now, asked.tokens, asked.mask, self.null, self.guidance)

    def follow(self, net: Denoiser, x: torch.Tensor, times: list[float], asked: Batch) -> torch.Tensor:
        """Euler steps through `times`."""
        for t, s in pairwise(times):
            x = x + (s - t) * self.velocity(net, x, t, asked)
        return x

"""Flow matching (Lipman et al. 2022, arXiv:2210.02747) on straight paths: x_t = (1-t) x_0 + t eps, v = eps - x_0.

The network predicts x_0 (JiT, arXiv:2511.13720); the loss is on the velocity: the x_0 error divided by max(t, 0.05),
the very clamp the exported pipeline uses. A network that predicts v is asked for its x_0 and has
no clamp to speak of, so its loss is ||v_hat - v||^2. Continuous t, no 1000-entry table; density and shift are separate options.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from models.engine.objective import Batch, Loss
from models.engine.randomness import Randomness
from models.networks.denoiser import T_CLAMP, Denoiser
from models.pretraining.config import TimestepConfig
from models.pretraining.repa import Repa
from models.pretraining.timesteps import draw_times


class FlowMatching:
    """The objective of pre-training, continued training, SFT and DreamBooth."""

    def __init__(self, denoiser: Denoiser, timesteps: TimestepConfig, repa: Repa | None = None) -> None:
        self.denoiser, self.timesteps, self.repa = denoiser, timesteps, repa
        self.model = nn.ModuleDict({"denoiser": denoiser})
        if repa is not None:
            self.model["projector"] = repa.projector
        self.step = 0

    @property
    def players(self) -> Mapping[str, nn.Module]:
        """One player: the denoiser (with REPA's projector)."""
        return {"denoiser": self.model}

    def turns(self, step: int) -> Sequence[str]:
        """The denoiser moves in every step."""
        self.step = step
        return ("denoiser",)

    def prepare(self, batch: Batch, rng: Randomness) -> Batch:
        """Draw t and eps and mix x_t."""
        _, _, height, width = batch.images.shape
        tokens = (height * width) // self.denoiser.patch_size**2
        t = draw_times(rng, tokens, self.timesteps)
        eps = rng.normal("noise", tuple(batch.images.shape[1:]))
        return replace(batch, extra={**batch.extra, "t": t, "eps": eps, "x_t": noised(batch.images, eps, t)})

    def loss(self, player: str, batch: Batch) -> Loss:
        """Mean squared velocity error (weighted per sample), plus REPA while it is active."""
        t, x_t = batch.extra["t"], batch.extra["x_t"]
        align = self.repa if self.repa is not None and batch.teacher is not None else None
        if align is not None and not align.active(self.step):
            align = None
        layer = None if align is None else align.config.layer
        x_0, hidden = self.denoiser(x_t, t, batch.tokens, batch.mask, layer)
        error = velocity_error(x_0, batch.images, t, self.denoiser.t_clamp)
        parts = {"flow": error.detach().mean()}
        total = error
        if align is not None and hidden is not None and batch.teacher is not None:
            repa = align(hidden, batch.teacher)
            parts["repa"] = repa.detach().mean()
            total = total + repa
        if batch.weight is not None:
            total = total * batch.weight
        return Loss(total.mean(), parts)

    def after_step(self, step: int) -> None:
        """Nothing to keep."""


def noised(x_0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """x_t = (1 - t) x_0 + t eps for t [B] and pictures [B, C, H, W]."""
    t = t.view(-1, 1, 1, 1)
    return (1 - t) * x_0 + t * eps


def velocity_error(
    predicted: torch.Tensor, x_0: torch.Tensor, t: torch.Tensor, clamp: float = T_CLAMP
) -> torch.Tensor:  # fmt: skip
    """Per-sample mean squared velocity error [B]: ||(x_0_hat - x_0) / max(t, clamp)||^2, the network's `t_clamp`."""
    return ((predicted - x_0) / t.clamp_min(clamp).view(-1, 1, 1, 1)).square().mean((1, 2, 3))

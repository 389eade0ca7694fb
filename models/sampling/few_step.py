"""Multi-step sampling of consistency, DMD and ADD students: predict x_0, noise it to the next time, again.

Consistency Models (arXiv:2303.01469, alg. 1) on the flow path, as diffusers' FlowMatchLCMScheduler does it. Each picture's
noises come from its own generator, first noise included, so a picture does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from models.networks.denoiser import Denoiser


@torch.no_grad()
def renoise(
    denoiser: Denoiser, noise: torch.Tensor, times: Sequence[float], tokens: torch.Tensor, mask: torch.Tensor,
    generators: Sequence[torch.Generator],
) -> torch.Tensor:  # fmt: skip
    """From noise [B, C, H, W] through all `times` (the last one is 0) to the picture."""
    x = noise
    for t, t_next in pairwise(times):
        now = x.new_full((len(x),), t)
        prediction, _ = denoiser.predict(x, now, tokens, mask)
        x_0 = x - t * denoiser.as_velocity(prediction, x, now)
        if t_next == 0.0:
            return x_0
        fresh = torch.stack([torch.randn(x.shape[1:], generator=generator) for generator in generators]).to(x.device)
        x = t_next * fresh + (1.0 - t_next) * x_0
    return x

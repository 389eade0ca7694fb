"""Heun sampling of the flow ODE (Karras et al. 2022, arXiv:2206.00364, alg. 1, without its churn): order 2, two looks a step.

The step to t = 0 is Euler's, where a second look would divide by 0: N steps ask the network 2 N - 1 times, as diffusers'
FlowMatchHeunDiscreteScheduler does. One Euler step of size 1/N at the end does not lower the order.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from models.networks.denoiser import Denoiser
from models.sampling.euler import guided_velocity


@torch.no_grad()
def integrate(
    denoiser: Denoiser, noise: torch.Tensor, times: Sequence[float], tokens: torch.Tensor, mask: torch.Tensor,
    null: tuple[torch.Tensor, torch.Tensor], guidance: float | torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """From noise [B, C, H, W] through all `times` to the picture or latent."""
    x = noise
    for t, t_next in pairwise(times):
        now, then = x.new_full((len(x),), t), x.new_full((len(x),), t_next)
        step = (then - now).view(-1, 1, 1, 1)
        v = guided_velocity(denoiser, x, now, tokens, mask, null, guidance)
        if t_next > 0:
            v = 0.5 * (v + guided_velocity(denoiser, x + step * v, then, tokens, mask, null, guidance))
        x = x + step * v
    return x

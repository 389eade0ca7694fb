"""Heun sampling of the flow ODE (Karras et al. 2022, arXiv:2206.00364, alg. 1, without its churn): order 2, two looks a step.

The step to t = 0 is Euler's, where a second look would divide by 0: N steps ask the network 2 N - 1 times, as diffusers'
FlowMatchHeunDiscreteScheduler does. One Euler step of size 1/N at the end does not lower the order.
"""

from __future__ import annotations

import torch

from models.networks.denoiser import Denoiser
from models.sampling.euler import guided_velocity


def heun_step(
    denoiser: Denoiser, x_t: torch.Tensor, t: torch.Tensor, t_next: torch.Tensor, tokens: torch.Tensor,
    mask: torch.Tensor, null: tuple[torch.Tensor, torch.Tensor], guidance: float | torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """x at t_next [B] from x at t [B]; t_next is 0 for all or for none."""
    step = (t_next - t).view(-1, 1, 1, 1)
    v = guided_velocity(denoiser, x_t, t, tokens, mask, null, guidance)
    if bool((t_next > 0).all()):
        v = 0.5 * (v + guided_velocity(denoiser, x_t + step * v, t_next, tokens, mask, null, guidance))
    return x_t + step * v

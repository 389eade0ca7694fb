"""Euler sampling of the flow ODE with classifier-free guidance (arXiv:2207.12598), as the stock pipeline does it.

Grid: t = 1, (N-1)/N, ..., 1/N shifted by k, then 0. Guidance acts on the x_0-prediction, which is turned into a
velocity with the clamp at 0.05, or on the velocity, whichever the network predicts; as the family's pipeline does it, so
its pixels are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from models.networks.denoiser import Denoiser
from models.pretraining.timesteps import apply_shift


def grid(steps: int, k: float = 1.0) -> list[float]:
    """The `steps` times at which the network is asked, descending from 1, followed by 0."""
    if steps < 1:
        raise ValueError(f"steps={steps} is below 1; ask for at least one step")
    times = torch.linspace(1.0, 1.0 / steps, steps, dtype=torch.float64)
    return [*apply_shift(times, k).tolist(), 0.0]


def guided_prediction(
    denoiser: Denoiser, x_t: torch.Tensor, t: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor,
    null: tuple[torch.Tensor, torch.Tensor], guidance: float | torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """uncond + guidance * (cond - uncond) [B, C, H, W] of what the network predicts, guidance one number or [B].

    `null` is the empty prompt's features and mask ([1, T, D], [1, T]).
    """
    if isinstance(guidance, torch.Tensor):
        guidance = guidance.view(-1, 1, 1, 1)
    elif guidance == 1.0:
        return denoiser.predict(x_t, t, tokens, mask)[0]
    b, length = len(x_t), max(tokens.shape[1], null[0].shape[1])
    both_tokens = torch.cat([_lengthened(null[0], length).expand(b, -1, -1), _lengthened(tokens, length)])
    both_masks = torch.cat([_lengthened(null[1], length).expand(b, -1), _lengthened(mask, length)])
    both, _ = denoiser.predict(torch.cat([x_t, x_t]), torch.cat([t, t]), both_tokens, both_masks)
    uncond, cond = both.chunk(2)
    return uncond + guidance * (cond - uncond)


def guided_x_0(
    denoiser: Denoiser, x_t: torch.Tensor, t: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor,
    null: tuple[torch.Tensor, torch.Tensor], guidance: float | torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """The guided x_0 [B, C, H, W]."""
    return denoiser.as_x_0(guided_prediction(denoiser, x_t, t, tokens, mask, null, guidance), x_t, t)


def guided_velocity(
    denoiser: Denoiser, x_t: torch.Tensor, t: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor,
    null: tuple[torch.Tensor, torch.Tensor], guidance: float | torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """The guided velocity [B, C, H, W]."""
    return denoiser.as_velocity(guided_prediction(denoiser, x_t, t, tokens, mask, null, guidance), x_t, t)


def _lengthened(x: torch.Tensor, length: int) -> torch.Tensor:
    """[B, T, ...] padded with zeros (False) to [B, length, ...]; masked positions change nothing."""
    missing = length - x.shape[1]
    return x if missing == 0 else torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], 1)


def euler_step(
    denoiser: Denoiser, x_t: torch.Tensor, t: torch.Tensor, t_next: torch.Tensor, tokens: torch.Tensor,
    mask: torch.Tensor, null: tuple[torch.Tensor, torch.Tensor], guidance: float | torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """x at t_next [B] from x at t [B]."""
    v = guided_velocity(denoiser, x_t, t, tokens, mask, null, guidance)
    return x_t + (t_next - t).view(-1, 1, 1, 1) * v


Step = Callable[..., torch.Tensor]  # as euler_step


@torch.no_grad()
def integrate(
    denoiser: Denoiser, noise: torch.Tensor, times: Sequence[float], tokens: torch.Tensor, mask: torch.Tensor,
    null: tuple[torch.Tensor, torch.Tensor], guidance: float | torch.Tensor, step: Step = euler_step,
) -> torch.Tensor:  # fmt: skip
    """From noise [B, C, H, W] through all `times` to the picture or latent, a `step` (Euler's or Heun's) at a time."""
    x = noise
    for t, t_next in pairwise(times):
        now, then = x.new_full((len(x),), t), x.new_full((len(x),), t_next)
        x = step(denoiser, x, now, then, tokens, mask, null, guidance)
    return x

"""Training times: densities of t and its shift (SD3, arXiv:2403.03206, section 3.1, eq. 19-23; Flux's exponential shift).

Internal time: t = 0 data, t = 1 noise. Every density is drawn by its inverse distribution function, so that stratified
uniform numbers give stratified times. Density, shift and loss weight (baselines.py) are separate choices.
logit-normal(m, s) shifted by k equals logit-normal(m + ln k, s) exactly.
diffusers' training scripts index a falling table with u, which turns the sign of a mean round: their +1 is our -1.
"""

from __future__ import annotations

import math
from typing import assert_never

import torch
from scipy.special import betaincinv

from models.engine.randomness import Randomness
from models.pretraining.config import TimestepConfig
from models.pretraining.densities import shift_of

__all__ = ["apply_shift", "draw_times", "mode_quantile", "sample_times", "shift_of", "unshifted"]
EDGE = 1e-12


def apply_shift(t: torch.Tensor, k: float | torch.Tensor) -> torch.Tensor:
    """t' = k t / (1 + (k - 1) t) with one k or k [B]; fixes 0 and 1, composes by product of k."""
    return k * t / (1 + (k - 1) * t)


def draw_times(rng: Randomness, tokens: int, config: TimestepConfig) -> torch.Tensor:
    """This step's times [B], one a slot."""
    return sample_times(rng.stratified("time") if config.stratified else rng.uniform("time"), tokens, config)


def sample_times(u: torch.Tensor, tokens: int, config: TimestepConfig) -> torch.Tensor:
    """Times [B] float32 in [0, 1] from uniform numbers `u` [B] by the inverse distribution function, then shifted."""
    if config.uniform_share > 0:  # the first of u choose the uniform part, the rest the density
        share = config.uniform_share
        rest = ((u.double() - share) / max(1 - share, EDGE)).clamp(0, 1)
        t = torch.where(u < share, u.double() / share, unshifted(rest, config).double())
    else:
        t = unshifted(u, config)
    return apply_shift(t, shift_of(tokens, config)).float()


def unshifted(u: torch.Tensor, config: TimestepConfig) -> torch.Tensor:
    """The density's quantiles [B] at `u` [B]; rises with u."""
    match config.density:
        case "uniform":
            return u
        case "logit_normal":
            z = torch.special.ndtri(u.double().clamp(EDGE, 1 - EDGE))
            return torch.sigmoid(config.mean + config.std * z)
        case "mode":  # SD3 eq. 20; its u falls
            return mode_quantile(1 - u.double(), config.mode_scale)
        case "cosmap":  # SD3 appendix: t = 1 - 1 / (tan(pi u / 2) + 1)
            return 1 - 1 / (torch.tan(math.pi / 2 * u.double()) + 1)
        case "beta":
            return torch.from_numpy(betaincinv(*config.beta, u.double().cpu().numpy())).to(u.device)
        case _:
            assert_never(config.density)


def mode_quantile(u: torch.Tensor, scale: float) -> torch.Tensor:
    """SD3's f(u; s) = 1 - u - s (cos^2(pi u / 2) - 1 + u); falls with u for -1 <= s <= 2 / (pi - 2)."""
    return 1 - u - scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)

"""Training times. SD3 (arXiv:2403.03206): logit-normal density (eq. 19) and the resolution-dependent shift (eq. 23).

Internal time: t = 0 data, t = 1 noise. logit-normal(m, s) shifted by k equals logit-normal(m + ln k, s) exactly.
"""

from __future__ import annotations

import math

import torch

from models.engine.randomness import Randomness
from models.pretraining.config import TimestepConfig


def shift_of(tokens: int, config: TimestepConfig) -> float:
    """k for a picture of `tokens` patches: 1 at `base_tokens`, more noise for larger pictures."""
    match config.shift:
        case "none":
            return 1.0
        case "sqrt_tokens":
            return math.sqrt(tokens / config.base_tokens)


def apply_shift(t: torch.Tensor, k: float | torch.Tensor) -> torch.Tensor:
    """t' = k t / (1 + (k - 1) t); fixes 0 and 1, composes by product of k."""
    return k * t / (1 + (k - 1) * t)


def draw_times(rng: Randomness, tokens: int, config: TimestepConfig) -> torch.Tensor:
    """This step's times [B], one a slot."""
    return sample_times(rng.stratified("time") if config.stratified else rng.uniform("time"), tokens, config)


def sample_times(u: torch.Tensor, tokens: int, config: TimestepConfig) -> torch.Tensor:
    """Times [B] float32 in [0, 1] from uniform numbers `u` [B] by the inverse distribution function, then shifted."""
    match config.density:
        case "uniform":
            t = u
        case "logit_normal":
            z = torch.special.ndtri(u.double().clamp(1e-12, 1 - 1e-12))
            t = torch.sigmoid(config.mean + config.std * z)
    return apply_shift(t, shift_of(tokens, config)).float()

"""Closed-form distribution functions of the training times, and the shift's k; no torch, so a plan can show them.

SD3 (arXiv:2403.03206), section 3.1 and appendix B.4: logit-normal (eq. 19), mode (eq. 20), CosMap (eq. 21), shift (eq. 23).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import assert_never

from models.pretraining.config import ShiftConfig, TimestepConfig

BISECTIONS = 60


def shift_of(tokens: int, config: ShiftConfig) -> float:
    """k for a picture of `tokens` patches: 1 means no shift, above 1 more noise."""
    match config.shift:
        case "none":
            return 1.0
        case "static":
            return config.static_shift
        case "sqrt_tokens":
            return math.sqrt(tokens / config.base_tokens)
        case "exponential":
            slope = (config.max_mu - config.base_mu) / (config.max_tokens - config.base_tokens)
            return math.exp(config.base_mu + slope * (tokens - config.base_tokens))
        case _:
            assert_never(config.shift)


def share_below(t: float, tokens: int, config: TimestepConfig) -> float:
    """P(time <= t) of the shifted density for pictures of `tokens` patches."""
    k = shift_of(tokens, config)
    before = t / (k + (1 - k) * t)  # the shift by 1 / k undoes it
    return config.uniform_share * before + (1 - config.uniform_share) * _unshifted(before, config)


def _unshifted(t: float, config: TimestepConfig) -> float:
    if t <= 0 or t >= 1:
        return min(max(t, 0.0), 1.0)
    match config.density:
        case "uniform":
            return t
        case "logit_normal":
            return NormalDist(config.mean, config.std).cdf(math.log(t / (1 - t)))
        case "mode":
            return _mode(t, config.mode_scale)
        case "cosmap":
            return 2 / math.pi * math.atan(t / (1 - t))
        case "beta":
            from scipy.special import betainc

            return float(betainc(*config.beta, t))
        case _:
            assert_never(config.density)


def _mode(t: float, scale: float) -> float:
    """1 - u where f(u) = t; f falls and has no inverse in elementary functions."""
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        u = (low + high) / 2
        above = 1 - u - scale * (math.cos(math.pi * u / 2) ** 2 - 1 + u) > t
        low, high = (u, high) if above else (low, u)
    return 1 - low


def histogram(tokens: int, config: TimestepConfig, bins: int = 10) -> list[float]:
    """Share of the training times in each of `bins` equal parts of [0, 1], data to noise."""
    edges = [share_below(i / bins, tokens, config) for i in range(bins + 1)]
    return [round(high - low, 4) for low, high in itertools.pairwise(edges)]


def bars(shares: Sequence[float]) -> str:
    """A histogram as one line of block characters, data (t = 0) to noise (t = 1)."""
    top = max(shares)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * share / top)] for share in shares)

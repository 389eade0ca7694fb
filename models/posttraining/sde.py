"""Stochastic steps of the flow from t down to s, each a Gaussian whose log-probability is exact.

With x_0 = x_t - t v and x_1 = x_t + (1 - t) v (the ends of the straight path through x_t):
  flow_sde  Flow-GRPO (Liu et al. 2025, arXiv:2505.05470, eq. 12), sigma = eta sqrt(t / (1 - t)), Euler-Maruyama;
  cps       Flow-CPS (Wang & Yu 2025, arXiv:2509.05952): std = s sin(eta pi/2), mean = (1-s) x_0 + s cos(eta pi/2) x_1;
  ou        flow_sde's noise as the exact solution with x_0 held fixed during the step, an Ornstein-Uhlenbeck process:
            rho = [(s/(1-s)) / (t/(1-t))]^(eta^2/2), mean = (1-s) x_0 + s rho x_1, std = s sqrt(1 - rho^2).
eta = 0 is the ODE in all three. `ou` has the ODE's marginals in the limit of many steps also when only a window of
early steps is stochastic; flow_sde adds noise there, and cps keeps too little at any number of steps (the tests tell).
The last step is the ODE's: pictures carry no noise, and no likelihood is divided by a vanishing variance.
"""

from __future__ import annotations

import math
from typing import Literal, assert_never

import torch

Sampler = Literal["flow_sde", "cps", "ou"]


def transition(
    sampler: Sampler, x_t: torch.Tensor, v: torch.Tensor, t: float, s: float, eta: float
) -> tuple[torch.Tensor, float]:
    """Mean (shape of x_t) and standard deviation of x_s given x_t with velocity v there."""
    if not 0 <= s < t <= 1:
        raise ValueError(f"a step goes from t down to s inside [0, 1], got t={t}, s={s}; give descending times")
    if s == 0:
        return x_t - t * v, 0.0
    match sampler:
        case "flow_sde":
            dt = s - t
            variance = eta**2 * t / (1 - (s if t == 1 else t))
            drift = variance / (2 * t)
            return x_t * (1 + drift * dt) + v * (1 + drift * (1 - t)) * dt, math.sqrt(variance * -dt)
        case "cps":
            x_0, x_1 = x_t - t * v, x_t + (1 - t) * v
            angle = eta * math.pi / 2
            return (1 - s) * x_0 + s * math.cos(angle) * x_1, s * math.sin(angle)
        case "ou":
            x_0, x_1 = x_t - t * v, x_t + (1 - t) * v
            rho = (s / (1 - s) * (1 - t) / t) ** (eta**2 / 2)
            return (1 - s) * x_0 + s * rho * x_1, s * math.sqrt(1 - rho**2)
        case _:
            assert_never(sampler)


def log_prob(x: torch.Tensor, mean: torch.Tensor, std: float) -> torch.Tensor:
    """log N(x; mean, std^2) [B], the mean over a sample's elements: ratios stay near 1 at any picture size."""
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"log-probabilities of {x.dtype} are too coarse for a ratio near 1; keep the steps in float32")
    element = -((x - mean) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)
    return element.flatten(1).mean(1)


def kl(mean: torch.Tensor, other: torch.Tensor, std: float) -> torch.Tensor:
    """KL divergence [B] of two steps with one standard deviation, per element."""
    return ((mean - other) ** 2).flatten(1).mean(1) / (2 * std**2)

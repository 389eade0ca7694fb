"""What a network can be asked to predict, on one path: x_t = (1 - t) x_0 + t eps.

Flow matching (arXiv:2210.02747) with x_0- or velocity-prediction; DDPM's eps (arXiv:2006.11239, eq. 14), v (Salimans and
Ho, arXiv:2202.00512), score (arXiv:2011.13456, VP) and EDM (arXiv:2206.00364, table 1). A diffusion process with signal a
and noise s is this path at t = s / (a + s), scaled by a + s: one time and one noise serve all, and each objective is an
input scale, a target and a way back to x_0. Left out: learned variances; discrete times; EDM's c_noise (the network is
told t itself).

g = 1 / sqrt((1 - t)^2 + t^2) is the scale of a variance-preserving process; SNR = ((1 - t) / t)^2.
"""

from __future__ import annotations

from typing import assert_never

import torch

from models.networks.denoiser import T_CLAMP, Denoiser
from models.networks.routing import Route
from models.pretraining.config import ObjectiveConfig

TINY = 1e-12


def column(t: torch.Tensor) -> torch.Tensor:
    """t [B] as [B, 1, 1, 1]."""
    return t.view(-1, 1, 1, 1)


def vp_scale(t: torch.Tensor) -> torch.Tensor:
    """g: what x_t is multiplied with to have the variance-preserving process' sample."""
    return ((1 - t).square() + t.square()).rsqrt()


def edm_scale(t: torch.Tensor, sigma_data: float) -> torch.Tensor:
    """1 / sqrt(t^2 + (sigma_data (1 - t))^2): EDM's c_in for x_t, where EDM's sample is x_t / (1 - t)."""
    return (t.square() + (sigma_data * (1 - t)).square()).rsqrt()


def input_scale(t: torch.Tensor, config: ObjectiveConfig) -> torch.Tensor | None:
    """What the network's input x_t is multiplied with, [B]; None: nothing."""
    match config.kind:
        case "x_0" | "velocity":
            return None
        case "ddpm_eps" | "ddpm_v" | "score":
            return vp_scale(t)
        case "edm":
            return edm_scale(t, config.sigma_data)
        case _:
            assert_never(config.kind)


def target(x_0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor, config: ObjectiveConfig) -> torch.Tensor:
    """What the network should answer, [B, C, H, W]."""
    t = column(t)
    match config.kind:
        case "x_0":
            return x_0
        case "velocity":
            return eps - x_0
        case "ddpm_eps":
            return eps
        case "score":  # the score of the variance-preserving sample times its noise level
            return -eps
        case "ddpm_v":
            return vp_scale(t) * ((1 - t) * eps - t * x_0)
        case "edm":  # (x_0 - c_skip x_t) / c_out
            scale, data = edm_scale(t, config.sigma_data), config.sigma_data
            return scale * (t * x_0 - data**2 * (1 - t) * eps) / data
        case _:
            assert_never(config.kind)


def as_x_0(output: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, config: ObjectiveConfig) -> torch.Tensor:
    """The clean picture [B, C, H, W] that an answer means; eps and score say nothing of it at t = 1 (clamped at 0.05)."""
    t = column(t)
    match config.kind:
        case "x_0":
            return output
        case "velocity":
            return x_t - t * output
        case "ddpm_eps":
            return (x_t - t * output) / (1 - t).clamp_min(T_CLAMP)
        case "score":
            return (x_t + t * output) / (1 - t).clamp_min(T_CLAMP)
        case "ddpm_v":
            scale = vp_scale(t)
            return scale.square() * (1 - t) * x_t - scale * t * output
        case "edm":
            scale, data = edm_scale(t, config.sigma_data), config.sigma_data
            return scale.square() * data**2 * (1 - t) * x_t + scale * t * data * output
        case _:
            assert_never(config.kind)


def error(
    output: torch.Tensor, x_0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor, config: ObjectiveConfig,
    clamp: float = T_CLAMP,
) -> torch.Tensor:  # fmt: skip
    """Per-sample loss [B] in float32 or better: ||output - target||^2, for x_0 over max(t, clamp)^2, times the weight.

    `clamp` is the network's `t_clamp`.
    """
    aim = target(x_0, eps, t, config)
    difference = output.to(aim.dtype) - aim
    if config.kind == "x_0":  # the velocity's error, with the very clamp the exported pipeline uses
        difference = difference / column(t.clamp_min(clamp))
    each = difference.square().mean((1, 2, 3))
    return each if config.weight == "own" else each * weight(t, config, clamp)


def weight(t: torch.Tensor, config: ObjectiveConfig, clamp: float = T_CLAMP) -> torch.Tensor:
    """Factor [B] on the objective's own loss."""
    match config.weight:
        case "own":
            return torch.ones_like(t)
        case "sigma_sqrt":
            return t.clamp_min(T_CLAMP) ** -2.0
        case "cosmap":
            return 2 / (torch.pi * (1 - 2 * t + 2 * t.square()))
        case "min_snr":
            return _min_snr(t, config, clamp)
        case _:
            assert_never(config.weight)


def _min_snr(t: torch.Tensor, config: ObjectiveConfig, clamp: float) -> torch.Tensor:
    """min(SNR, gamma) (arXiv:2303.09556) as a weight on the x_0 error, over the objective's own weight of it."""
    clean, noise = (1 - t).square(), t.square()
    match config.kind:
        case "x_0":
            return torch.minimum(clean / noise.clamp_min(TINY), t.new_tensor(config.gamma)) * t.clamp_min(clamp) ** 2
        case "velocity":
            return torch.minimum(clean, config.gamma * noise)
        case "ddpm_eps" | "score":  # min(1, gamma / SNR), which has no pole at SNR = 0
            return (config.gamma * noise / clean.clamp_min(TINY)).clamp_max(1.0)
        case "ddpm_v":
            return torch.minimum(clean, config.gamma * noise) / (clean + noise)
        case "edm":
            scale = edm_scale(t, config.sigma_data) * config.sigma_data
            return torch.minimum(clean, config.gamma * noise) * scale.square()
        case _:
            assert_never(config.kind)


class Predictor(Denoiser):
    """A network trained for any kind, asked as the x_0-predictor that samplers and validation expect."""

    def __init__(self, denoiser: Denoiser, config: ObjectiveConfig) -> None:
        super().__init__(denoiser.transformer)
        self.denoiser, self.config = denoiser, config

    def predict(
        self, x_t: torch.Tensor, t: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor,
        hidden_layer: int | None = None, condition: torch.Tensor | None = None, route: Route | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """The clean picture [B, C, H, W]."""
        scale = input_scale(t, self.config)
        given = x_t if scale is None else x_t * column(scale)
        output, hidden = self.denoiser(given, t, tokens, mask, hidden_layer, condition, route)
        return as_x_0(output, x_t, t, self.config), hidden

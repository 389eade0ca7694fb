"""Perceptual distance by the formula of LPIPS (Zhang et al. 2018, arXiv:1801.03924, eq. 1).

d(x, y) = sum_l mean_hw || w_l * (phi_l(x) - phi_l(y)) ||^2, phi_l unit-normed over channels. `lpips` takes networks and
learnt w_l from the package of that name; `efficientnet_lite0` is the same formula on the packaged encoder with w_l = 1,
which is *not* LPIPS and is named so in logs and cards. Never a silent fallback from one to the other, or to MSE.
"""

from __future__ import annotations

from typing import Protocol, assert_never

import torch
from torch import nn

from models.device import compute_device
from models.distillation.config import Perceptual
from models.networks.image_encoder import ImageEncoder


class Distance(Protocol):
    """A differentiable distance of two batches of pictures in [-1, 1]."""

    def __call__(self, x: torch.Tensor, y: torch.Tensor, /) -> torch.Tensor:
        """Per sample [B]."""


class FeatureDistance(nn.Module):
    """LPIPS' formula on the packaged encoder."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Per sample [B]."""
        with torch.no_grad():
            theirs = self.encoder(y)
        total = x.new_zeros(len(x))
        for a, b in zip(self.encoder(x), theirs, strict=True):
            total = total + (unit(a) - unit(b)).square().sum(1).mean((1, 2))
        return total


def unit(features: torch.Tensor) -> torch.Tensor:
    """Features [B, C, h, w] with norm one over the channels."""
    return features / (features.square().sum(1, keepdim=True) + 1e-10).sqrt()


def distance_of(name: Perceptual) -> Distance:
    """The distance asked for, or an error that says what to install."""
    match name:
        case "efficientnet_lite0":
            return FeatureDistance(ImageEncoder()).to(compute_device())
        case "lpips":
            try:
                import lpips  # type: ignore[import-not-found]
            except ModuleNotFoundError as error:
                raise ModuleNotFoundError(
                    "perceptual loss lpips: the package and its weights are not installed; run: pip install lpips, or "
                    "choose efficientnet_lite0 (the same formula on the packaged encoder)"
                ) from error
            net = lpips.LPIPS(net="vgg", verbose=False).to(compute_device()).eval().requires_grad_(False)
            return lambda x, y: net(x, y).flatten()
        case _:
            assert_never(name)

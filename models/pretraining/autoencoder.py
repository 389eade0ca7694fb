"""A small AutoencoderKL (Kingma & Welling 2013, arXiv:1312.6114; latents for diffusion: Rombach et al., arXiv:2112.10752, sec. 3.1).

loss = |x - x^| + gradient_weight |grad x - grad x^| + kl_weight KL(q(z|x) || N(0, 1)), means per element; the posterior is
sampled. The difference of neighbouring pixels stands in for LPIPS and the critic, which need downloaded weights and are left
out. Afterwards the mean and the deviation of the latents become shift_factor and scaling_factor, so x_0 has unit variance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from models.device import compute_device
from models.engine.objective import Batch, Loss
from models.engine.randomness import Randomness
from models.pretraining.autoencoder_config import AutoencoderConfig


class Autoencoder:
    """Player `vae`, a stock AutoencoderKL."""

    def __init__(self, vae: Any, config: AutoencoderConfig) -> None:
        self.vae, self.config = vae, config

    @property
    def players(self) -> Mapping[str, nn.Module]:
        """One player: encoder and decoder together."""
        return {"vae": self.vae}

    def turns(self, step: int) -> Sequence[str]:
        """It moves in every step."""
        return ("vae",)

    def prepare(self, batch: Batch, rng: Randomness) -> Batch:
        """Noise of the posterior."""
        _, _, h, w = batch.images.shape
        shape = (self.config.latent_channels, h // self.config.factor, w // self.config.factor)
        return replace(batch, extra={**batch.extra, "eps": rng.normal("posterior", shape)})

    def loss(self, player: str, batch: Batch) -> Loss:
        """Reconstruction, its gradients, and the KL."""
        posterior = self.vae.encode(batch.images).latent_dist
        mean, log_variance = posterior.mean, posterior.logvar
        z = mean + (0.5 * log_variance).exp() * batch.extra["eps"]
        error = self.vae.decode(z).sample - batch.images
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        total = error.abs().mean() + self.config.gradient_weight * edges + self.config.kl_weight * kl
        return Loss(total, {"reconstruction": error.detach().abs().mean(), "edges": edges.detach(), "kl": kl.detach()})

    def after_step(self, step: int) -> None:
        """Nothing to keep."""


def build(config: AutoencoderConfig, seed: int) -> Any:
    """A fresh AutoencoderKL with one level of channels per halving of the side."""
    from diffusers import AutoencoderKL

    levels = len(config.channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKL(
            block_out_channels=config.channels, layers_per_block=config.layers, latent_channels=config.latent_channels,
            down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
            norm_num_groups=config.norm_groups, scaling_factor=1.0, shift_factor=0.0, mid_block_add_attention=False,
        )  # fmt: skip


@torch.no_grad()
def measure(vae: Any, batches: Callable[[int], Batch], steps: int, seed: int) -> dict[str, float]:
    """Mean and deviation of drawn latents, written into the VAE's config as shift and scale, and the PSNR in dB."""
    drawn, errors = [], []
    for step in range(steps):
        batch = batches(step).to(compute_device())
        posterior = vae.encode(batch.images).latent_dist
        eps = Randomness(seed, step, batch.slots, compute_device()).normal("measure", tuple(posterior.mean.shape[1:]))
        drawn.append((posterior.mean + posterior.std * eps).flatten())
        errors.append((vae.decode(posterior.mean).sample.clamp(-1, 1) - batch.images).square().mean())
    latents = torch.cat(drawn).double()
    shift, scale = float(latents.mean()), 1 / float(latents.std())
    vae.register_to_config(scaling_factor=scale, shift_factor=shift)
    return {"scale": scale, "shift": shift, "psnr": float(10 * torch.log10(4 / torch.stack(errors).double().mean()))}

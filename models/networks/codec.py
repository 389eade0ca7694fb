"""Between pictures and what is denoised: pixels as they are, or the latents of a VAE (AutoencoderKL, AutoencoderDC).

A latent z is stored as its posterior's mean and log-variance, so that every visit of a picture draws z anew (Rombach et al.
2021, arXiv:2112.10752, sec. 3.1). The network sees x_0 = (z - shift) * scale; AutoencoderDC has no posterior, its z is exact.
Shapes: B pictures [B, 3, H, W] in [-1, 1], latents [B, C, H / f, W / f].
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from models.device import compute_device

NO_VARIANCE = -30.0  # log-variance of a latent that is exact; diffusers clamps there
VAE_CLASSES = ("AutoencoderKL", "AutoencoderDC")


class Codec(Protocol):
    """What a family needs of its picture space."""

    @property
    def factor(self) -> int:
        """Pixels per latent along a side."""

    @property
    def channels(self) -> int:
        """Channels of what is denoised."""

    def x_0(self, pictures: torch.Tensor) -> torch.Tensor:
        """Pictures [B, 3, H, W] as the network sees them, without noise of a posterior."""

    def pictures(self, x_0: torch.Tensor) -> torch.Tensor:
        """Inverse of `x_0`: about -1 to 1, not clamped; differentiable."""

    def settled(self, x_0: torch.Tensor) -> torch.Tensor:
        """A drawn x_0 as data: pixels have a range, latents none."""


class Pixels:
    """No codec: the network sees the picture."""

    factor, channels = 1, 3

    def x_0(self, pictures: torch.Tensor) -> torch.Tensor:
        """The picture."""
        return pictures

    def pictures(self, x_0: torch.Tensor) -> torch.Tensor:
        """The picture."""
        return x_0

    def settled(self, x_0: torch.Tensor) -> torch.Tensor:
        """Clamped to the range of pixels."""
        return x_0.clamp(-1, 1)


@dataclass(frozen=True)
class Scaling:
    """x_0 = (z - shift) * scale of a VAE's latents z."""

    scale: float
    shift: float

    def x_0(self, z: torch.Tensor) -> torch.Tensor:
        """What the network sees of a latent."""
        return (z - self.shift) * self.scale

    def z(self, x_0: torch.Tensor) -> torch.Tensor:
        """Inverse of `x_0`, in the stock pipelines' order of operations."""
        return x_0 / self.scale + self.shift


class Vae:
    """A frozen stock autoencoder."""

    def __init__(self, network: Any) -> None:
        self.network = network.to(compute_device()).eval().requires_grad_(False)
        config = network.config
        self.scaling = Scaling(float(config.scaling_factor), float(getattr(config, "shift_factor", None) or 0.0))
        own = getattr(network, "spatial_compression_ratio", None)
        self.factor = int(own) if own is not None else 2 ** (len(config.block_out_channels) - 1)
        self.channels = int(config.latent_channels)

    @torch.no_grad()
    def moments(self, pictures: torch.Tensor) -> torch.Tensor:
        """Mean and log-variance of the posterior [B, 2C, H / f, W / f]."""
        if hasattr(self.network, "quant_conv"):
            parameters = self.network.encode(pictures.to(compute_device())).latent_dist
            return torch.cat([parameters.mean, parameters.logvar], 1)
        latent = self.network.encode(pictures.to(compute_device())).latent
        return torch.cat([latent, torch.full_like(latent, NO_VARIANCE)], 1)

    def x_0(self, pictures: torch.Tensor) -> torch.Tensor:
        """The posterior's mean, scaled."""
        return self.scaling.x_0(self.moments(pictures).chunk(2, 1)[0])

    def pictures(self, x_0: torch.Tensor) -> torch.Tensor:
        """Decoded."""
        decoded: torch.Tensor = self.network.decode(self.scaling.z(x_0), return_dict=False)[0]
        return decoded

    def settled(self, x_0: torch.Tensor) -> torch.Tensor:
        """As it is."""
        return x_0


def drawn(moments: torch.Tensor, eps: torch.Tensor, scaling: Scaling) -> torch.Tensor:
    """x_0 [B, C, h, w] of posteriors [B, 2C, h, w] with standard normal eps [B, C, h, w]."""
    mean, log_variance = moments.chunk(2, 1)
    return scaling.x_0(mean + (0.5 * log_variance).exp() * eps)


def load_vae(folder: Path) -> Vae:
    """The autoencoder in a folder, by the class its config names; safetensors only."""
    import diffusers

    from models.networks.diffusers_folder import class_of, refuse_pickles

    name = class_of(folder)
    if name not in VAE_CLASSES:
        raise ValueError(f"{folder}: autoencoder class {name} is not supported; {' and '.join(VAE_CLASSES)} are")
    refuse_pickles(folder)
    network = getattr(diffusers, name).from_pretrained(
        folder, local_files_only=True, use_safetensors=True, torch_dtype=torch.float32, low_cpu_mem_usage=False
    )
    if network.config.get("shift_factor", 0.0) is None:
        network.register_to_config(shift_factor=0.0)  # stock pipelines add it as it is
    return Vae(network)


def factor_of(checkpoint: Path) -> int:
    """Pixels per latent along a side; 1 without a VAE."""
    return load_vae(checkpoint / "vae").factor if (checkpoint / "vae").is_dir() else 1

"""Settings of the VAE stage."""

from __future__ import annotations

from pydantic import Field, model_validator

from infra.config import Config
from models.engine.config import OptimizerConfig, TrainConfig


class AutoencoderConfig(Config):
    """A small AutoencoderKL of one's own."""

    name: str = Field(default="autoencoder", pattern=r"^[a-z0-9-]+$", description="Name of the stage")
    train: TrainConfig = TrainConfig(
        steps=2000, batch_size=16, optimizer=OptimizerConfig(muon_lr=None, adamw_lr=1e-3, warmup_steps=50)
    )
    channels: tuple[int, ...] = Field(default=(32, 64), min_length=1, description="Channels; each level but one halves")
    layers: int = Field(default=1, ge=1, description="Residual blocks of each level")
    latent_channels: int = Field(default=4, ge=1, description="Channels of a latent")
    norm_groups: int = Field(default=8, ge=1, description="Groups of the normalisations; divides all channels")
    gradient_weight: float = Field(default=1.0, ge=0, description="Weight of the error of neighbouring differences")
    kl_weight: float = Field(default=1e-4, ge=0, description="Weight of the KL to N(0, 1)")
    resolutions: tuple[int, ...] = Field(default=(32,), min_length=1, description="Base sides to train on")
    prompt_max_tokens: int = Field(default=64, ge=8, description="Longest prompt of the models in its latents")

    @property
    def factor(self) -> int:
        """Pixels per latent along a side."""
        return int(2 ** (len(self.channels) - 1))

    @model_validator(mode="after")
    def _groups_divide(self) -> AutoencoderConfig:
        if odd := [c for c in self.channels if c % self.norm_groups]:
            raise ValueError(f"channels {odd} are no multiples of norm_groups={self.norm_groups}; change one of them")
        return self

"""Settings of flow-matching stages: pre-training, continued training and SFT are all presets of this."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from infra.config import Config
from models.engine.config import TrainConfig
from models.networks.config import PrxConfig


class TimestepConfig(Config):
    """Density of the training time t (0 = data, 1 = noise), before the shift."""

    density: Literal["uniform", "logit_normal"] = Field(default="logit_normal", description="Density of t")
    mean: float = Field(default=0.0, ge=-5, le=5, description="Mean of logit(t); above 0 means more noise")
    std: float = Field(default=1.0, gt=0, le=5, description="Standard deviation of logit(t)")
    stratified: bool = Field(default=True, description="Spread a batch's times evenly over the density")
    shift: Literal["none", "sqrt_tokens"] = Field(
        default="sqrt_tokens", description="sqrt_tokens: k = sqrt(tokens / base_tokens) per sample (SD3)"
    )
    base_tokens: int = Field(default=64, ge=1, description="Token count at which k = 1")


class RepaConfig(Config):
    """REPA (arXiv:2410.06940): align a hidden layer with frozen features of the clean picture."""

    coefficient: float = Field(default=0.5, ge=0, description="Weight of the alignment term")
    layer: int = Field(default=2, ge=0, description="0-based index of the aligned block")
    hidden: int = Field(default=192, ge=1, description="Width of the projector")
    until: float = Field(default=0.6, gt=0, le=1, description="Share of the stage after which the term stops (HASTE)")


class SelectConfig(Config):
    """Which rows of the training set a stage reads, and with which caption."""

    resolutions: tuple[int, ...] = Field(default=(32,), min_length=1, description="Base sides to train on")
    shares: tuple[float, ...] | None = Field(
        default=None, description="Share of the steps of each resolution; null: by the number of pictures"
    )
    domains: tuple[str, ...] | None = Field(default=None, description="Only these domains; null means all")
    long_captions: float = Field(default=0.0, ge=0, le=1, description="Share of samples with the long caption")
    empty_captions: float = Field(default=0.1, ge=0, lt=1, description="Share of samples without caption (for CFG)")
    replay: float = Field(default=0.0, ge=0, lt=1, description="Share of the steps drawn from all domains instead")

    @model_validator(mode="after")
    def _a_share_each(self) -> SelectConfig:
        if self.shares is not None and (
            len(self.shares) != len(self.resolutions) or min(self.shares) <= 0 or abs(sum(self.shares) - 1) > 1e-6
        ):
            raise ValueError(
                f"shares={self.shares} must be one positive share for each of resolutions={self.resolutions}, 1 in all"
            )
        return self


class SamplingConfig(Config):
    """How the trained model is to be sampled; saved with it."""

    steps: int = Field(default=8, ge=1, le=1000, description="Euler steps")
    guidance: float = Field(default=2.0, ge=1, le=30, description="Classifier-free guidance; 1 = none")
    side: int = Field(default=32, ge=8, description="Default side in pixels")


class FlowMatchingConfig(Config):
    """One flow-matching stage."""

    name: str = Field(default="pretrain-32", pattern=r"^[a-z0-9-]+$", description="Name of the stage")
    network: PrxConfig = PrxConfig()
    train: TrainConfig = TrainConfig()
    timesteps: TimestepConfig = TimestepConfig()
    repa: RepaConfig | None = RepaConfig()
    select: SelectConfig = SelectConfig()
    sampling: SamplingConfig = SamplingConfig()

    @model_validator(mode="after")
    def _layer_exists(self) -> FlowMatchingConfig:
        if self.repa is not None and self.repa.layer >= self.network.depth:
            raise ValueError(
                f"repa.layer={self.repa.layer} but the network has depth={self.network.depth} blocks; lower it"
            )
        return self

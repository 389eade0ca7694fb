"""Settings of preference tuning."""

from __future__ import annotations

from pydantic import Field

from infra.config import Config
from models.engine.config import OptimizerConfig, TrainConfig
from models.pretraining.config import TimestepConfig


class PairsConfig(Config):
    """Preference pairs from the model's own pictures: best and worst of a group under a reward."""

    name: str = Field(default="pairs", pattern=r"^[a-z0-9-]+$", description="Name of the stage")
    prompts: int = Field(default=160, ge=2, description="Distinct training prompts")
    group: int = Field(default=4, ge=2, description="Pictures per prompt")
    steps: int = Field(default=8, ge=1, description="Euler steps of the rollouts")
    guidance: float = Field(default=2.0, ge=1, description="Guidance of the rollouts, as at inference")
    min_gap: float = Field(default=0.05, ge=0, description="Reward gap below which a pair is a tie and dropped")
    seed: int = Field(default=0, ge=0, description="Seed of prompts and noise")


class DpoConfig(Config):
    """Diffusion-DPO."""

    name: str = Field(default="dpo", pattern=r"^[a-z0-9-]+$", description="Name of the stage")
    train: TrainConfig = TrainConfig(
        steps=120, batch_size=16, ema_gamma=6.0, log_every=10,
        optimizer=OptimizerConfig(muon_lr=5e-4, adamw_lr=5e-5, warmup_steps=10),
    )  # fmt: skip
    timesteps: TimestepConfig = TimestepConfig()
    beta_per_element: float = Field(
        default=0.5, gt=0, description="beta over the sum of squared errors; beta on the mean is this times 3HW"
    )
    anchor: float = Field(
        default=0.25,
        ge=0,
        description="Flow matching on the preferred pictures, over the preference's strongest pull beta/2",
    )

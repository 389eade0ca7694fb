"""Settings of distillation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from infra.config import Config
from models.engine.config import OptimizerConfig, TrainConfig


class DistillConfig(Config):
    """One student."""

    name: str = Field(default="distill-1", pattern=r"^[a-z0-9-]+$", description="Name of the stage")
    method: Literal["consistency", "progressive"] = Field(default="consistency", description="Technique")
    student_steps: int = Field(default=1, ge=1, description="Steps of the student")
    teacher_steps: int = Field(default=16, ge=2, description="Steps of the teacher's grid that is distilled")
    guidance: float = Field(default=2.0, ge=1, description="Teacher guidance, distilled into the student")
    noise_share: float = Field(default=0.33, ge=0, le=1, description="Consistency: share of the batch at t = 1")
    target_decay: float = Field(default=0.95, ge=0, lt=1, description="Consistency: EMA decay of the target network")
    huber: float = Field(default=0.01, gt=0, description="Consistency: pseudo-Huber constant (per element)")
    long_captions: float = Field(default=0.3, ge=0, le=1, description="Share of samples with the long caption")
    resolutions: tuple[int, ...] = Field(default=(32,), min_length=1, description="Base sides to distill on")
    train: TrainConfig = TrainConfig(
        steps=250, batch_size=24, ema_gamma=6.0,
        optimizer=OptimizerConfig(muon_lr=0.002, adamw_lr=4e-4, warmup_steps=10),
    )  # fmt: skip

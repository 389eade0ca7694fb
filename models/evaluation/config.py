"""Settings of the judge; pydantic only, so that flows can import it without torch."""

from __future__ import annotations

from pydantic import Field, model_validator

from infra.config import Config


class JudgeConfig(Config):
    """How the two judge networks (colour and shape) are trained on rendered scenes."""

    seed: int = Field(default=0, ge=0, description="Seed of the renders, the corruptions and the initial weights")
    pictures: int = Field(default=10_000, ge=64, description="Scenes rendered once for training")
    calibration_pictures: int = Field(
        default=400, ge=8, description="Fresh scenes for the figures saved beside the judge"
    )
    updates: int = Field(default=650, ge=1, description="Optimizer steps of each network")
    batch_size: int = Field(
        default=96, ge=8, description="Pictures in a step; half of them are corrupted and must be rejected"
    )
    learning_rate: float = Field(
        default=4e-3, gt=0, description="Peak AdamW learning rate (linear warm-up, cosine to zero)"
    )
    width: int = Field(
        default=16, ge=4, description="Channels of the first convolution; the others are multiples of it"
    )
    feature_size: int = Field(
        default=128, ge=8, description="Length of the penultimate features used by the kernel distance"
    )
    reject_above: float = Field(
        default=0.6, gt=0, lt=1, description="A picture whose reject probability is higher is never right"
    )


class GateConfig(Config):
    """A bound on one metric of one stage, absolute or relative to another stage on the same prompts and seeds."""

    stage: str = Field(min_length=1, description="Checkpoint the bound is about")
    metric: str = Field(default="prompt_accuracy", min_length=1, description="Metric of scores.json")
    minimum: float | None = Field(default=None, description="The value must reach this")
    maximum: float | None = Field(default=None, description="The value must not exceed this")
    parent: str | None = Field(default=None, description="Stage it is compared with")
    parent_drop: float | None = Field(default=None, description="Largest loss against the parent; < 0 demands a gain")
    parent_ratio: float | None = Field(default=None, gt=0, description="Smallest share of the parent's value")

    @model_validator(mode="after")
    def _bounded(self) -> GateConfig:
        relative = self.parent_drop is not None or self.parent_ratio is not None
        if relative != (self.parent is not None):
            raise ValueError(
                f"gate on {self.stage}.{self.metric}: a parent and a parent bound go together; "
                "set parent and parent_drop or parent_ratio, or neither"
            )
        if not relative and self.minimum is None and self.maximum is None:
            raise ValueError(f"gate on {self.stage}.{self.metric} has no bound; set minimum, maximum or a parent bound")
        return self

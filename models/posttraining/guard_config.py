"""Settings of the guards of preference tuning."""

from __future__ import annotations

from pydantic import Field, model_validator

from infra.config import Config
from infra.stages import IF_SET
from models.engine.config import TrainConfig
from models.evaluation.config import HubReward


class OutsideConfig(Config):
    """Prompts unlike those that are trained on, which the held-out reward watches too.

    With the demo's judge: the long wording, which no preference stage trains on, of published scenes that are neither
    trained on nor among the guard's; the evaluation asks held-out scenes only.
    """

    prompts: int = Field(default=24, ge=1, description="Prompts with the demo's judge")
    texts: tuple[str, ...] = Field(default=(), description="Prompts of one's own; guard.held_out judges them")


class GuardConfig(Config):
    """When preference tuning is stopped, and the best weights so far are taken instead."""

    every: int = Field(default=20, ge=1, description="Steps between looks; a multiple of train.log_every")
    prompts: int = Field(default=24, ge=1, description="Prompts that are never trained on")
    seeds: int = Field(default=4, ge=2, description="Pictures per prompt")
    patience: int = Field(default=2, ge=1, description="Bad looks in a row after which training stops")
    errors: float = Field(default=2.0, ge=0, description="Standard errors the held-out reward may lie below the start")
    min_diversity: float = Field(default=0.8, ge=0, description="Least within-prompt diversity over the start's")
    max_drift: float | None = Field(
        default=None, gt=0, description="Largest squared change of the velocity at any time, over its square; null: any"
    )
    held_out: HubReward | None = Field(
        default=None, description="Held-out reward; null: the demo's shape judge", json_schema_extra=IF_SET
    )
    outside: OutsideConfig | None = Field(
        default=None,
        description="A second set, of prompts unlike the trained ones; null: none",
        json_schema_extra=IF_SET,
    )

    @model_validator(mode="after")
    def _who_judges_outside(self) -> GuardConfig:
        if self.outside is not None and bool(self.outside.texts) != (self.held_out is not None):
            raise ValueError(
                "guard.outside.texts are judged by guard.held_out, which needs them; the demo's judge knows its own "
                "scenes only: give both, or neither"
            )
        return self


def check_looks(guard: GuardConfig | None, train: TrainConfig) -> None:
    """A run may only end where its log ends, and what watches must not be a target."""
    if guard is not None and guard.held_out is not None and guard.held_out.role != "held_out":
        raise ValueError(f"guard.held_out is {guard.held_out.label!r} of role trained; set its role to held_out")
    if guard is not None and guard.every % train.log_every:
        raise ValueError(
            f"guard.every={guard.every} is not a multiple of train.log_every={train.log_every}; "
            "a run that stops between two log rows would lose one"
        )

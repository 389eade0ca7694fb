"""A checkpoint folder: the stock transformer and how to sample it. Every training stage writes one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from infra.config import Config
from models.networks.config import FamilyName
from models.networks.denoiser import Denoiser, Prediction
from models.networks.diffusers_folder import FROZEN, take
from models.pretraining.config import ShiftConfig, ShiftRule


class SamplingCard(Config):
    """sampling.json: all that is needed to sample the weights beside it as they were trained."""

    family: FamilyName = Field(default="prx-pixel", description="Network family")
    prediction: Prediction = Field(default="x_0", description="What the network predicts")
    steps: int = Field(default=8, ge=1, description="Steps of the sampler")
    guidance: float = Field(default=2.0, ge=1, description="Guidance scale (standard form; 1 = none)")
    side: int = Field(default=32, ge=8, description="Default side in pixels")
    prompt_max_tokens: int = Field(default=64, ge=8, description="Prompt length the pipeline pads to")
    shift: ShiftRule = Field(default="sqrt_tokens", description="Rule of the time shift")
    base_tokens: int = Field(default=64, ge=1, description="Token count at which the shift is 1")
    distilled: bool = Field(default=False, description="True for students: steps and guidance are fixed by training")
    sampler: Literal["euler", "heun", "renoise"] = Field(
        default="euler", description="ODE steps of order 1 or 2, or x_0 and fresh noise"
    )
    trained_steps: tuple[int, ...] | None = Field(default=None, description="Step counts a student can be asked")
    method: str | None = Field(default=None, description="How a student was distilled")
    distilled_guidance: float | None = Field(default=None, description="Teacher guidance inside a student")
    teacher: str | None = Field(default=None, description="Digest of a student's teacher")
    trigger: str | None = Field(default=None, description="Rare token of a personalised checkpoint")
    scheduler: dict[str, Any] | None = Field(
        default=None,
        description="A foreign pipeline's scheduler, whose grid is kept",
        exclude_if=lambda kept: kept is None,
    )
    origin: dict[str, Any] | None = Field(
        default=None,
        description="Foreign pipeline at the root: source, revision, class",
        exclude_if=lambda o: o is None,
    )
    static_shift: float = Field(default=3.0, gt=0, description="As in ShiftConfig", exclude_if=lambda k: k == 3.0)
    max_tokens: int = Field(default=4096, ge=2, description="As in ShiftConfig", exclude_if=lambda n: n == 4096)
    base_mu: float = Field(default=0.5, description="As in ShiftConfig", exclude_if=lambda mu: mu == 0.5)
    max_mu: float = Field(default=1.15, description="As in ShiftConfig", exclude_if=lambda mu: mu == 1.15)

    @property
    def shift_rule(self) -> ShiftConfig:
        """How the sampling grid is shifted: the rule of training."""
        return ShiftConfig(**{name: getattr(self, name) for name in ShiftConfig.model_fields})


def transformer_folder(checkpoint: Path, card: SamplingCard, steps: int) -> Path:
    """Where the weights for a step count lie: a student may have other weights for other step counts."""
    own = checkpoint / f"transformer-{steps}"
    return own if steps != card.steps and own.exists() else checkpoint / "transformer"


def check_steps(card: SamplingCard, steps: int, guidance: float, sampler: str | None = None) -> None:
    """Refuse to sample a student as it was not trained."""
    if not card.distilled:
        return
    if sampler not in (None, card.sampler):
        raise ValueError(
            f"sampler={sampler} was not trained: this {card.method} student takes {card.sampler} steps; leave sampler out"
        )
    if card.trained_steps is not None and steps not in card.trained_steps:
        raise ValueError(
            f"steps={steps} was not trained: this {card.method} student takes {sorted(card.trained_steps)} steps; "
            "ask one of them, or distil for more"
        )
    if guidance != 1.0:
        raise ValueError(
            f"guidance={guidance} on a distilled student would be applied twice; its guidance "
            f"{card.distilled_guidance} is inside the weights, sample with 1.0"
        )


def write_checkpoint(folder: Path, denoiser: Denoiser, card: SamplingCard, frozen: Path | None = None) -> None:
    """Write transformer/ (text standardisation folded in) and sampling.json, with the frozen components of a folder."""
    denoiser.save(folder / "transformer")
    if frozen is not None:
        take(frozen, folder, FROZEN)
    (folder / "sampling.json").write_text(card.model_dump_json(indent=2))


def read_card(folder: Path) -> SamplingCard:
    """The sampling card of a checkpoint folder."""
    path = folder / "sampling.json"
    try:
        return SamplingCard.model_validate_json(path.read_text())
    except (OSError, ValidationError) as error:
        raise ValueError(f"{folder} is not a checkpoint: {error}; give the folder of a training stage") from error

"""A checkpoint folder: the stock transformer and how to sample it. Every training stage writes one."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from infra.config import Config
from models.networks import prx
from models.networks.prx import Denoiser


class SamplingCard(Config):
    """sampling.json: all that is needed to sample the weights beside it as they were trained."""

    family: Literal["prx-pixel"] = Field(default="prx-pixel", description="Network family")
    prediction: Literal["x_0"] = Field(default="x_0", description="What the network predicts")
    steps: int = Field(default=8, ge=1, description="Euler steps")
    guidance: float = Field(default=2.0, ge=1, description="Guidance scale (standard form; 1 = none)")
    side: int = Field(default=32, ge=8, description="Default side in pixels")
    prompt_max_tokens: int = Field(default=64, ge=8, description="Prompt length the pipeline pads to")
    shift: Literal["none", "sqrt_tokens"] = Field(default="sqrt_tokens", description="Rule of the time shift")
    base_tokens: int = Field(default=64, ge=1, description="Token count at which the shift is 1")
    distilled: bool = Field(default=False, description="True for students: steps and guidance are fixed by training")
    trigger: str | None = Field(default=None, description="Rare token of a personalised checkpoint")


def write_checkpoint(folder: Path, denoiser: Denoiser, card: SamplingCard) -> None:
    """Write transformer/ (text standardisation folded in) and sampling.json."""
    prx.save(denoiser, folder / "transformer")
    (folder / "sampling.json").write_text(card.model_dump_json(indent=2))


def read_card(folder: Path) -> SamplingCard:
    """The sampling card of a checkpoint folder."""
    path = folder / "sampling.json"
    try:
        return SamplingCard.model_validate_json(path.read_text())
    except (OSError, ValidationError) as error:
        raise ValueError(f"{folder} is not a checkpoint: {error}; give the folder of a training stage") from error

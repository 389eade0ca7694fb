"""Settings of the judge; pydantic only, so that flows can import it without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from infra.config import Config
from infra.hub_models import HubModel, KnownModel
from infra.local_files import fingerprint
from infra.stages import UNVERSIONED
from models.evaluation.geneval import read_prompts

SEGMENTERS = ("mask2former",)
CLOSED = ("detr", "conditional_detr", "yolos")
OPEN = ("owlvit", "owlv2")


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


class ClipConfig(KnownModel):
    """A CLIP of transformers, in safetensors."""

    types: ClassVar[tuple[str, ...]] = ("clip",)

    processor: HubModel | None = Field(
        default=None, description="Where its tokenizer and image processor lie, if not beside its weights"
    )


class HubReward(ClipConfig):
    """A CLIP that people's preferences were taught; a picture's score is its cosine with the prompt."""

    kind: Literal["pickscore", "hps", "clip"] = Field(
        default="pickscore",
        description="pickscore: times the model's own scale, as published; hps and clip: the cosine",
    )
    name: str = Field(default="", pattern=r"^[a-z0-9-]*$", description="Of the score; empty: its kind")
    role: Literal["trained", "held_out"] = Field(
        default="trained", description="held_out: only watches, refused as a target"
    )
    batch_size: int = Field(
        default=16, ge=1, description="Pictures at once where no gradient is asked", json_schema_extra=UNVERSIONED
    )

    @property
    def label(self) -> str:
        """Name of the score."""
        return self.name or self.kind


class DetectorConfig(KnownModel):
    """A detector or instance segmenter that names the objects of a picture, and a CLIP that names their colour."""

    types: ClassVar[tuple[str, ...]] = (*SEGMENTERS, *CLOSED, *OPEN)

    clip: ClipConfig | None = Field(default=None, description="Names colours; null: no prompt may ask for one")
    confidence: float = Field(default=0.3, gt=0, lt=1, description="Score above which an object counts (GenEval: .3)")
    counting_confidence: float = Field(
        default=0.9, gt=0, lt=1, description="The same for prompts tagged `counting` (GenEval: .9)"
    )
    max_overlap: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Overlap (IoU) from which a less sure object of a class is dropped; 1: none",
    )
    batch_size: int = Field(default=8, ge=1, description="Pictures at once", json_schema_extra=UNVERSIONED)


class PromptFile(Config):
    """Prompts of GenEval's form; a file that cannot be used is refused when this is read."""

    path: str = Field(min_length=1, description="JSONL: prompt, tag, include and exclude")
    fingerprint: str | None = Field(default=None, description="Digest of the file; null: taken when this is read")
    pictures: int = Field(default=4, ge=1, le=64, description="Pictures per prompt (GenEval: 4)")
    side: int | None = Field(default=None, ge=8, description="Side of the pictures, px; null: each checkpoint's own")

    @model_validator(mode="before")
    @classmethod
    def _look(cls, data: Any) -> Any:
        data = {"path": str(data)} if isinstance(data, str | Path) else data
        if not isinstance(data, dict) or not isinstance(data.get("path"), str) or data.get("fingerprint"):
            return data
        read_prompts(Path(data["path"]).expanduser())
        return data | {"fingerprint": fingerprint(Path(data["path"]))}

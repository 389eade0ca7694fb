"""Settings of the judge, evaluation and report stages; pydantic only (no torch, ray or prefect at import)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from data_curation.filter_config import Embedding, PackagedEmbedder
from infra.config import Config
from infra.local_files import fingerprint
from infra.stages import IF_SET
from models.evaluation.config import DetectorConfig, GateConfig, HubReward, JudgeConfig, PromptFile
from models.evaluation.geneval import read_prompts

__all__ = [
    "CompareConfig",
    "DistributionConfig",
    "EvaluateConfig",
    "ExportConfig",
    "FeaturesConfig",
    "GateConfig",
    "JudgeConfig",
    "ModelConfig",
    "PicturesConfig",
    "PromptSetConfig",
    "ReportConfig",
    "SubjectConfig",
]

PromptSetName = Literal["held_out_basic", "held_out_full", "training", "long"]


class PromptSetConfig(Config):
    """One fixed list of prompts and seeds, the same for every checkpoint it is asked of."""

    name: PromptSetName = Field(default="held_out_basic", description="Which scenes and which wording")
    prompts: int = Field(default=320, ge=1, description="How many (prompt, seed) pairs")
    stages: tuple[str, ...] | None = Field(default=None, description="Checkpoints asked; none given = every checkpoint")
    side: int = Field(
        default=32, ge=32, le=512, description="Side of the pictures drawn; above 32 the metrics get a suffix"
    )


class SubjectConfig(Config):
    """The subject a personalised checkpoint must know."""

    stage: str = Field(default="dreambooth-robot", min_length=1, description="Checkpoint that learnt the subject")
    parent: str = Field(default="sft", min_length=1, description="Checkpoint it started from")
    scene_object: str = Field(default="robot", min_length=1, description="The subject's name in the scene vocabulary")
    phrase: str = Field(
        default="eels robot", min_length=1, description="What a prompt calls the subject: token and class"
    )
    mixed: tuple[str, ...] = Field(default=(), description="Mixes that must know the subject beside others")
    prompts: int = Field(default=48, ge=4, description="How many subject pictures are drawn and judged")


class EvaluateConfig(Config):
    """What every checkpoint is asked and which bounds it must keep."""

    seed: int = Field(default=1234, ge=0, description="Seed of the prompt lists and of the pictures' noise")
    sets: tuple[PromptSetConfig, ...] = Field(
        default=(
            PromptSetConfig(name="held_out_basic", prompts=320),
            PromptSetConfig(name="held_out_full", prompts=96),
            PromptSetConfig(name="long", prompts=320, stages=("continue", "sft")),
        ),
        min_length=1,
        description="Prompt lists; the first one also feeds the kernel distance and the class drift",
    )
    subjects: tuple[SubjectConfig, ...] = Field(default=(), description="Subjects of personalised checkpoints")
    gates: tuple[GateConfig, ...] = Field(default=(), description="Bounds; verdicts are written to the scores")
    strict_gates: bool = Field(
        default=False, description="Fail this stage when a gate is missed, instead of only reporting it"
    )
    refuse_collapsed: bool = Field(
        default=True, description="Fail this stage when a checkpoint draws black, constant, noisy or always the same"
    )
    diversity_prompts: int = Field(
        default=12, ge=0, description="Prompts drawn several times for the diversity within a prompt"
    )
    diversity_seeds: int = Field(default=4, ge=2, description="Pictures per prompt for diversity")
    bootstrap: int = Field(default=200, ge=20, description="Resamples behind each kernel-distance interval")
    grid_prompts: int = Field(default=12, ge=1, description="Prompts in the cross-stage grid")
    batch_size: int = Field(default=8, ge=1, description="Pictures sampled at a time; few stay in a CPU's cache")
    detector: DetectorConfig | None = Field(
        default=None, description="Names what pictures show, for the categories and geneval; null: the judge",
        json_schema_extra=IF_SET,
    )  # fmt: skip
    geneval: PromptFile | None = Field(
        default=None, description="Prompts of GenEval's form that every checkpoint draws", json_schema_extra=IF_SET
    )
    rewards: tuple[HubReward, ...] = Field(
        default=(), description="PickScore, HPS or CLIP of every prompt list", json_schema_extra=IF_SET
    )

    @model_validator(mode="after")
    def _detector_answers(self) -> EvaluateConfig:
        refuse_twice(self.rewards)
        if self.detector is not None and self.detector.clip is None and self.geneval is None:
            raise ValueError("detector names the demo's colours too; give it a clip")
        if self.geneval is None:
            return self
        if self.detector is None:
            raise ValueError("geneval needs a detector; set evaluate.detector.model")
        path = Path(self.geneval.path).expanduser()
        if self.detector.clip is None and path.exists() and any(p.asks_colour for p in read_prompts(path)):
            raise ValueError(f"{path} asks for colours; give the detector a clip that names them")
        return self


class PicturesConfig(Config):
    """Captions of the data that every checkpoint draws with the same noise, for the page."""

    prompts: int = Field(default=12, ge=1, description="Captions; held-out ones first")
    seed: int = Field(default=1234, ge=0, description="Chooses captions and noise")


class DistributionConfig(Config):
    """Checkpoints' pictures against held-out pictures of the training set, on an embedding."""

    embedder: Embedding = Field(default=PackagedEmbedder(side=128), description="What turns a picture into a vector")
    aesthetic: Path | None = Field(
        default=None, description="Linear head on the embedding (safetensors: weight, bias) that scores aesthetics"
    )
    rewards: tuple[HubReward, ...] = Field(
        default=(), description="PickScore, HPS or CLIP of the pictures and their captions", json_schema_extra=IF_SET
    )
    pictures: int = Field(default=256, ge=40, description="Pictures drawn; as many real ones are compared with")
    training: int = Field(default=1024, ge=1, description="Training pictures searched for copies")
    resolution: int | None = Field(
        default=None, ge=8, description="Of the real pictures, px; null: the last checkpoint's"
    )
    caption: Literal["short", "long"] = Field(default="short", description="Captions that are drawn")
    bootstrap: int = Field(default=200, ge=20, description="Resamples behind intervals of means")
    seed: int = Field(default=1234, ge=0, description="Chooses pictures and noise")

    @model_validator(mode="after")
    def _named_apart(self) -> DistributionConfig:
        refuse_twice(self.rewards)
        return self


def refuse_twice(rewards: tuple[HubReward, ...]) -> None:
    """Scores are told apart by their names."""
    labels = [reward.label for reward in rewards]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise ValueError(f"two rewards are called {twice[0]!r}; give one of them a name")


class ReportConfig(Config):
    """What the one-page report shows."""

    title: str = Field(default="Text-to-image lifecycle", min_length=1, description="Heading of the page")
    data_source: Literal["demo", "own"] = Field(
        default="demo", description="Whether the drawings are OpenMoji and need their credit"
    )
    dropped_examples: int = Field(default=10, ge=0, le=60, description="Pictures in each gallery of dropped rows")
    thumbnail_side: int = Field(default=72, ge=16, le=256, description="Longest side of a gallery picture in pixels")
    command: str | None = Field(
        default=None, description="Command shown on the page", json_schema_extra={"versioned": False}
    )
    grid_columns: tuple[str, ...] | None = Field(
        default=None, description="Stages in the grid, in order; none given = all"
    )
    max_megabytes: float = Field(default=10.0, gt=0, description="The page must stay below this size")


class ModelConfig(Config):
    """A foreign diffusers pipeline to start from."""

    source: str = Field(min_length=1, description="diffusers folder, or hub id OWNER/NAME, best with @COMMIT")
    fingerprint: str | None = Field(default=None, description="Digest of the folder; null: taken when this is read")
    side: int | None = Field(default=None, ge=8, description="Side of the pictures it draws, px; null: its own default")
    steps: int = Field(default=28, ge=1, le=1000, description="Euler steps")
    guidance: float = Field(default=7.0, ge=1, le=30, description="Guidance")
    prompt_max_tokens: int = Field(default=256, ge=8, le=512, description="Longest prompt in tokens (SD3: of the T5)")

    @model_validator(mode="before")
    @classmethod
    def _take_fingerprint(cls, data: Any) -> Any:
        if isinstance(data, str):
            data = {"source": data}
        if isinstance(data, dict) and isinstance(data.get("source"), str) and data.get("fingerprint") is None:
            return data | {"fingerprint": fingerprint(Path(data["source"]).expanduser())}
        return data


class FeaturesConfig(Config):
    """The training set in a model's own terms; the model decides all."""

    name: str = Field(default="features", pattern=r"^[a-z0-9-]+$", description="Name of the stage")


class ExportConfig(Config):
    """Which checkpoints become pipelines is decided by the stage's inputs: a role is the name of a folder."""

    name: str = Field(default="export", pattern=r"^[a-z0-9-]+$", description="Name of the stage")


class CompareConfig(Config):
    """Students against their teacher on the same prompts and noise, at the same numbers of steps."""

    seed: int = Field(default=1234, ge=0, description="Seed of the prompt lists and of the pictures' noise")
    basic_prompts: int = Field(default=192, ge=4, description="Held-out prompts of the basic vocabulary")
    full_prompts: int = Field(default=96, ge=4, description="Held-out prompts of the full vocabulary")
    teacher_steps: tuple[int, ...] = Field(
        default=(1, 2, 4, 8, 50), min_length=1, description="Step counts of the teacher; the largest is what 100 % is"
    )
    student_steps: tuple[int, ...] = Field(default=(1, 2, 4), min_length=1, description="Step counts of the students")
    guidance: float = Field(default=2.0, ge=1, le=30, description="The teacher's guidance")
    diversity_prompts: int = Field(default=8, ge=1, description="Prompts drawn several times")
    diversity_seeds: int = Field(default=4, ge=2, description="Pictures per prompt for diversity")
    tolerance: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Accuracy a student may lack to the teacher; what chance does in few prompts",
    )
    latency_rounds: int = Field(default=12, ge=2, description="Batches timed for each row and batch size")
    latency_batches: tuple[int, ...] = Field(
        default=(1, 8), min_length=1, description="Pictures per batch whose latency is measured"
    )
    bootstrap: int = Field(default=200, ge=20, description="Resamples behind each interval")
    batch_size: int = Field(default=8, ge=1, description="Pictures sampled at a time")
    strict_gate: bool = Field(
        default=False, description="Fail this stage when a student does not beat its teacher, instead of reporting it"
    )

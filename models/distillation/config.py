"""Settings of distillation: what every student needs, and one class of settings per method."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from infra.config import Config
from models.engine.config import OptimizerConfig, TrainConfig
from models.networks.config import LoraConfig

Perceptual = Literal["efficientnet_lite0", "lpips"]


class ProgressiveConfig(Config):
    """Progressive distillation: one or several halvings in a row, guidance distilled in the first."""

    kind: Literal["progressive"] = "progressive"
    teacher_steps: int = Field(
        default=8, ge=2, description="Teacher's steps at the start; halved down to the student's"
    )


class InstaFlowConfig(Config):
    """InstaFlow: straighten the teacher's flow on its own pairs, then learn its end points in one step."""

    kind: Literal["instaflow"] = "instaflow"
    reflow_share: float = Field(default=0.4, ge=0, le=1, description="Share of the steps spent on reflow (2-RF)")
    perceptual_share: float = Field(
        default=0.2, ge=0, le=1, description="Share of the steps, at the end, with the perceptual loss instead of MSE"
    )
    perceptual: Perceptual = Field(
        default="efficientnet_lite0",
        description="Features of the perceptual loss: LPIPS' own weights, or its formula on the packaged encoder",
    )

    @model_validator(mode="after")
    def _shares_fit(self) -> InstaFlowConfig:
        if self.reflow_share + self.perceptual_share > 1:
            raise ValueError(
                f"reflow_share={self.reflow_share} and perceptual_share={self.perceptual_share} are more than all "
                "steps together; lower one"
            )
        return self


class ConsistencyConfig(Config):
    """Consistency distillation; with `guidance_range` it is LCM, with `lora` LCM-LoRA, without teacher training."""

    kind: Literal["consistency"] = "consistency"
    teacher_steps: int = Field(default=16, ge=2, description="Steps of the teacher's grid")
    skip: int = Field(default=1, ge=1, description="Grid steps one teacher step jumps over (LCM: skipping-step)")
    use_teacher: bool = Field(
        default=True, description="False: consistency training, the next point comes from the data's own path"
    )
    noise_share: float = Field(default=0.33, ge=0, le=1, description="Share of the batch at t = 1")
    target_decay: float = Field(default=0.95, ge=0, lt=1, description="EMA decay of the target network")
    huber: float = Field(default=0.01, gt=0, description="Pseudo-Huber constant (per element)")
    guidance_range: tuple[float, float] | None = Field(
        default=None, description="LCM: guidance drawn from this range and given to the student as an embedding"
    )
    lora: LoraConfig | None = Field(default=None, description="LCM-LoRA: train adapters, leave the base as it is")

    @model_validator(mode="after")
    def _sound(self) -> ConsistencyConfig:
        if self.skip > self.teacher_steps:
            raise ValueError(f"skip={self.skip} is more than teacher_steps={self.teacher_steps}; lower it")
        if self.guidance_range is not None and not 1 <= self.guidance_range[0] <= self.guidance_range[1]:
            raise ValueError(
                f"guidance_range={self.guidance_range} must be two rising numbers from 1 on (standard form)"
            )
        if self.guidance_range is not None and (self.lora is not None or not self.use_teacher):
            raise ValueError(
                "guidance_range needs a teacher and an embedding outside the adapters; drop lora or the range"
            )
        if self.lora is not None and self.lora.init == "pissa":
            raise ValueError("lora.init=pissa changes the base that LCM-LoRA promises to leave alone; set it to zero")
        return self


class ScmConfig(Config):
    """Continuous-time consistency distillation (sCM) after a change of variables from flow matching to TrigFlow."""

    kind: Literal["scm"] = "scm"
    mean: float = Field(default=0.4, description="Mean of ln tan t")
    std: float = Field(default=1.4, gt=0, description="Deviation of ln tan t")
    warmup: float = Field(default=0.3, ge=0, le=1, description="Share of the steps over which the tangent is phased in")
    noise_share: float = Field(default=0.33, ge=0, le=1, description="Share of the batch at pure noise")


class DmdConfig(Config):
    """Distribution matching distillation, version 2, with DMD1's regression term as an option."""

    kind: Literal["dmd"] = "dmd"
    fake_steps: int = Field(default=3, ge=1, description="TTUR: updates of the fake score per update of the student")
    fake_rate: float = Field(default=1.0, gt=0, description="Fake score's learning rates over the student's")
    gan_weight: float = Field(default=0.0, ge=0, description="Weight of the adversarial term; 0 leaves it out")
    gan_layer: int = Field(default=1, ge=0, description="Block of the fake score whose tokens the critic's head reads")
    regression_weight: float = Field(default=0.0, ge=0, description="DMD1: weight of the regression on teacher pairs")
    regression_loss: Perceptual = Field(default="efficientnet_lite0", description="Features of the regression term")


class AddConfig(Config):
    """Adversarial diffusion distillation (pixels, image encoder) and its latent form LADD (teacher's own blocks)."""

    kind: Literal["add"] = "add"
    features: Literal["image_encoder", "teacher"] = Field(
        default="image_encoder", description="What the critic's heads read: packaged encoder (ADD) or teacher (LADD)"
    )
    layer: int = Field(default=1, ge=0, description="LADD: block of the teacher whose tokens are read")
    adversarial_weight: float = Field(default=0.02, ge=0, description="Weight of the adversarial term")
    distillation_weight: float = Field(default=1.0, ge=0, description="Weight of the distillation term")
    most_noise: float = Field(default=0.9, gt=0, le=1, description="Largest time of the distillation term's teacher")
    r1_weight: float = Field(default=1e-3, ge=0, description="Weight of the gradient penalty on the critic's features")
    critic_rate: float = Field(default=10.0, gt=0, description="Critic's learning rates over the student's")


class MeanFlowConfig(Config):
    """MeanFlow with the teacher's velocity: the average velocity of any interval in one stage."""

    kind: Literal["meanflow"] = "meanflow"
    instant_share: float = Field(default=0.25, ge=0, le=1, description="Share of the batch with r = t (plain flow)")
    whole_share: float = Field(default=0.35, ge=0, le=1, description="Share of the batch on the interval 1 to 0")
    mean: float = Field(default=0.4, description="Mean of the logit of the times")
    std: float = Field(default=1.0, gt=0, description="Deviation of the logit of the times")
    split: float | None = Field(
        default=0.125,
        gt=0,
        le=1,
        description="Teacher step cut off each interval; null: the paper's derivative instead",
    )
    power: float = Field(default=1.0, ge=0, le=1, description="Adaptive weight 1 / (error + 0.01)^power")

    @model_validator(mode="after")
    def _shares_fit(self) -> MeanFlowConfig:
        if self.instant_share + self.whole_share > 1:
            raise ValueError(
                f"instant_share={self.instant_share} and whole_share={self.whole_share} exceed 1; lower one"
            )
        return self


Method = Annotated[
    ProgressiveConfig | InstaFlowConfig | ConsistencyConfig | ScmConfig | DmdConfig | AddConfig | MeanFlowConfig,
    Field(discriminator="kind"),
]


class DistillConfig(Config):
    """One student."""

    name: str = Field(default="distill-1", pattern=r"^[a-z0-9-]+$", description="Name of the stage")
    method: Method = Field(default=ConsistencyConfig(), description="Technique with its own settings")
    start: str | None = Field(
        default=None, description="Earlier student whose weights it starts from; null: the teacher"
    )
    pairs: str | None = Field(default=None, description="Pair store it learns from, if it needs one; null: the first")
    student_steps: int = Field(default=1, ge=1, le=64, description="Steps of the student")
    guidance: float = Field(default=2.0, ge=1, le=30, description="Teacher guidance (standard form), distilled")
    long_captions: float = Field(default=0.3, ge=0, le=1, description="Share of samples with the long caption")
    resolutions: tuple[int, ...] = Field(default=(32,), min_length=1, description="Base sides to distill on")
    train: TrainConfig = TrainConfig(
        steps=250, batch_size=24, ema_gamma=6.0,
        optimizer=OptimizerConfig(muon_lr=0.002, adamw_lr=4e-4, warmup_steps=10),
    )  # fmt: skip

    @property
    def needs_pairs(self) -> bool:
        """Whether the method trains on stored (noise, picture) pairs of the teacher."""
        match self.method:
            case InstaFlowConfig():
                return True
            case DmdConfig():
                return self.method.regression_weight > 0
            case _:
                return False

    @model_validator(mode="after")
    def _halves(self) -> DistillConfig:
        if isinstance(self.method, ProgressiveConfig):
            ratio, rest = divmod(self.method.teacher_steps, self.student_steps)
            if rest or ratio < 2 or ratio & (ratio - 1):
                raise ValueError(
                    f"progressive distillation halves: teacher_steps={self.method.teacher_steps} must be "
                    f"student_steps={self.student_steps} times 2, 4, 8, ...; change one"
                )
        return self


class PairStoreConfig(Config):
    """The teacher's pictures with the seed of the noise each came from: what InstaFlow and DMD1 learn from."""

    name: str = Field(default="teacher-pairs", pattern=r"^[a-z0-9-]+$", description="Name of the stage")
    source: str | None = Field(
        default=None, description="Student whose pairs are made (a second reflow); null: teacher"
    )
    count: int = Field(default=512, ge=2, description="Pairs")
    steps: int = Field(default=16, ge=1, le=1000, description="Euler steps of the teacher")
    guidance: float = Field(default=2.0, ge=1, le=30, description="Guidance of the teacher (standard form)")
    long_captions: float = Field(default=0.3, ge=0, le=1, description="Share of pairs with the long caption")
    resolution: int = Field(default=32, ge=8, description="Side of the pictures in pixels")
    shard_rows: int = Field(default=64, ge=1, description="Pairs a shard")
    seed: int = Field(default=0, ge=0, description="Seed of prompts and noises")

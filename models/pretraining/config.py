"""Settings of flow-matching stages: pre-training, continued training and SFT are all presets of this."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from infra.config import Config
from infra.stages import IF_SET
from models.engine.config import TrainConfig
from models.networks.config import LoraConfig, NetworkConfig, PrxConfig

MODE_LIMIT = 2 / (math.pi - 2)  # beyond it the mode density's inverse is not monotone (SD3, appendix B.4)
Density = Literal["uniform", "logit_normal", "mode", "cosmap", "beta"]
Prediction = Literal["x_0", "velocity", "ddpm_eps", "ddpm_v", "edm", "score"]
ShiftRule = Literal["none", "sqrt_tokens", "static", "exponential"]


class ShiftConfig(Config):
    """How the times are shifted by a picture's token count: the same rule in training, sampling and export."""

    shift: ShiftRule = Field(
        default="sqrt_tokens",
        description="static: k = static_shift; sqrt_tokens: k = sqrt(tokens / base_tokens) per sample (SD3); "
        "exponential: k = exp(mu), mu linear in the tokens (Flux)",
    )
    base_tokens: int = Field(default=64, ge=1, description="Token count at which k = 1 (exponential: mu = base_mu)")
    static_shift: float = Field(default=3.0, gt=0, description="static: k of every picture", json_schema_extra=IF_SET)
    max_tokens: int = Field(
        default=4096, ge=2, description="exponential: token count at which mu = max_mu", json_schema_extra=IF_SET
    )
    base_mu: float = Field(default=0.5, description="exponential: mu at base_tokens", json_schema_extra=IF_SET)
    max_mu: float = Field(default=1.15, description="exponential: mu at max_tokens", json_schema_extra=IF_SET)

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if self.shift == "exponential" and self.max_tokens <= self.base_tokens:
            raise ValueError(
                f"max_tokens={self.max_tokens} must be above base_tokens={self.base_tokens} for shift=exponential; "
                "Flux has 4096 and 256"
            )
        return self


class TimestepConfig(ShiftConfig):
    """Density of the training time t (0 = data, 1 = noise) before the shift, and the shift."""

    density: Density = Field(default="logit_normal", description="Density of t")
    mean: float = Field(default=0.0, ge=-5, le=5, description="Mean of logit(t); above 0 means more noise")
    std: float = Field(default=1.0, gt=0, le=5, description="Standard deviation of logit(t)")
    stratified: bool = Field(default=True, description="Spread a batch's times evenly over the density")
    mode_scale: float = Field(
        default=1.29, ge=-1, le=MODE_LIMIT, description="mode: above 0 favours the middle, below 0 the ends",
        json_schema_extra=IF_SET,
    )  # fmt: skip
    beta: tuple[float, float] = Field(
        default=(1.0, 1.0), description="beta: the two exponents; the first above the second means more noise",
        json_schema_extra=IF_SET,
    )  # fmt: skip
    uniform_share: float = Field(
        default=0.0, ge=0, le=1, description="Mixture: share of the times that is drawn uniformly instead",
        json_schema_extra=IF_SET,
    )  # fmt: skip

    @model_validator(mode="after")
    def _exponents(self) -> Self:
        if min(self.beta) <= 0:
            raise ValueError(f"beta={self.beta} must be two numbers above 0, such as (2, 1)")
        return self


class ObjectiveConfig(Config):
    """What the network predicts and how its error is weighted over t (baselines.py); compare on validation only."""

    kind: Prediction = Field(
        default="x_0", description="x_0 and velocity: flow matching; ddpm_eps, ddpm_v, edm, score: baselines"
    )
    weight: Literal["own", "min_snr", "sigma_sqrt", "cosmap"] = Field(
        default="own", description="own: the objective's; min_snr: clamped SNR; sigma_sqrt, cosmap: SD3's on velocity"
    )
    gamma: float = Field(default=5.0, gt=0, description="min_snr: the SNR at which the weight stops growing")
    sigma_data: float = Field(default=0.5, gt=0, description="edm: standard deviation of the pictures")


class RepaConfig(Config):
    """Alignment of a hidden layer: REPA (arXiv:2410.06940), iREPA, or the encoder-free kinds."""

    coefficient: float = Field(default=0.5, ge=0, description="Weight of the alignment term")
    layer: int = Field(default=2, ge=0, description="0-based index of the aligned block")
    hidden: int = Field(default=192, ge=1, description="Width of the projector")
    until: float = Field(default=0.6, gt=0, le=1, description="Share of the stage after which the term stops (HASTE)")
    kind: Literal["teacher", "dispersive", "self"] = Field(
        default="teacher", description="teacher: features of an encoder; dispersive, self: no encoder",
        json_schema_extra=IF_SET,
    )  # fmt: skip
    projector: Literal["mlp", "conv"] = Field(
        default="mlp", description="conv: one 3x3 convolution over the token grid (iREPA)", json_schema_extra=IF_SET
    )
    spatial_norm: float | None = Field(
        default=None, ge=0, le=1, description="iREPA: share of the features' mean over the grid taken out, then unit std",
        json_schema_extra=IF_SET,
    )  # fmt: skip
    teacher: str = Field(
        default="cached", description="cached: the training set's; packaged: the packaged encoder; or a repository or "
        "folder of a vision transformer for transformers.AutoModel", json_schema_extra=IF_SET,
    )  # fmt: skip
    teacher_revision: str | None = Field(
        default=None, description="Commit of the teacher's repository", json_schema_extra=IF_SET
    )
    temperature: float = Field(default=0.5, gt=0, description="dispersive: tau", json_schema_extra=IF_SET)
    target_layer: int | None = Field(
        default=None, ge=1, description="self: 0-based block of the averaged network; null: the last",
        json_schema_extra=IF_SET,
    )  # fmt: skip
    time_gap: float = Field(
        default=0.2, ge=0, lt=1, description="self: the averaged network sees up to this much less noise",
        json_schema_extra=IF_SET,
    )  # fmt: skip

    @property
    def needs_cached_features(self) -> bool:
        """Whether the training set must hold teacher features."""
        return self.kind == "teacher" and self.teacher == "cached"


class TreadConfig(Config):
    """TREAD (arXiv:2501.04765): a random share of the picture's tokens skips the blocks first..last."""

    share: float = Field(default=0.5, gt=0, lt=1, description="Share of the tokens that skips")
    first: int = Field(default=1, ge=0, description="0-based index of the first block skipped")
    last: int = Field(default=2, ge=0, description="0-based index of the last block skipped")

    @model_validator(mode="after")
    def _span(self) -> TreadConfig:
        if self.last < self.first:
            raise ValueError(f"tread.last={self.last} is before tread.first={self.first}; swap them")
        return self


class SelectConfig(Config):
    """Which rows of the training set a stage reads, and with which caption."""

    resolutions: tuple[int, ...] = Field(default=(32,), min_length=1, description="Base sides to train on")
    shares: tuple[float, ...] | None = Field(
        default=None, description="Share of the steps of each resolution; null: by the number of pictures"
    )
    domains: tuple[str, ...] | None = Field(default=None, description="Only these domains; null means all")
    long_captions: float = Field(default=0.0, ge=0, le=1, description="Share of samples with the long caption")
    empty_captions: float = Field(default=0.1, ge=0, lt=1, description="Share of samples without caption (for CFG)")
    empty_encoders: float = Field(
        default=0.0, ge=0, lt=1, json_schema_extra=IF_SET,
        description="SD3: share of samples in which one text encoder reads no caption, each encoder on its own",
    )  # fmt: skip
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


class PhaseConfig(Config):
    """A part of a curriculum; what is null is as the stage says."""

    from_samples: int = Field(default=0, ge=0, description="Samples seen before this phase begins")
    select: SelectConfig | None = Field(default=None, description="Resolutions, aspects, captions")
    timesteps: TimestepConfig | None = Field(default=None, description="Density and shift")
    batch_size: int | None = Field(default=None, ge=1, description="Pictures per step; null keeps the tokens constant")
    repa: bool = Field(default=True, description="Whether the stage's alignment is on")
    tread: TreadConfig | None = Field(default=None, description="Token routing")


class SamplingConfig(Config):
    """How the trained model is to be sampled; saved with it."""

    steps: int = Field(default=8, ge=1, le=1000, description="Steps of the sampler")
    sampler: Literal["euler", "heun"] = Field(
        default="euler", description="heun: order 2, the network is asked twice a step", json_schema_extra=IF_SET
    )
    guidance: float = Field(default=2.0, ge=1, le=30, description="Classifier-free guidance; 1 = none")
    side: int = Field(default=32, ge=8, description="Default side in pixels")


class ValidationConfig(Config):
    """The loss on held-out pictures at eight fixed times with fixed noise (validation.py)."""

    pictures: int = Field(default=64, ge=1, description="Held-out pictures, evenly over the validation split")
    every: int = Field(default=200, ge=1, description="Steps between looks; a multiple of train.log_every")
    patience: int | None = Field(
        default=None, ge=1, description="Looks without a better average that end the stage with its best; null: none do",
        json_schema_extra=IF_SET,
    )  # fmt: skip


class FlowMatchingConfig(Config):
    """One flow-matching stage."""

    name: str = Field(default="pretrain-32", pattern=r"^[a-z0-9-]+$", description="Name of the stage")
    network: NetworkConfig = PrxConfig()
    train: TrainConfig = TrainConfig()
    timesteps: TimestepConfig = TimestepConfig()
    repa: RepaConfig | None = RepaConfig()
    select: SelectConfig = SelectConfig()
    sampling: SamplingConfig = SamplingConfig()
    lora: LoraConfig | None = Field(
        default=None, description="Train adapters of these layers only; null: all weights", json_schema_extra=IF_SET
    )
    objective: ObjectiveConfig = Field(
        default=ObjectiveConfig(), description="Prediction and loss weight", json_schema_extra=IF_SET
    )
    tread: TreadConfig | None = Field(default=None, description="Token routing", json_schema_extra=IF_SET)
    curriculum: tuple[PhaseConfig, ...] = Field(
        default=(), description="Phases by samples seen; none: one phase", json_schema_extra=IF_SET
    )
    validation: ValidationConfig | None = Field(
        default=None, description="Loss on held-out pictures while training", json_schema_extra=IF_SET
    )
    log_bins: int = Field(
        default=0, ge=0, le=100, description="Equal parts of [0, 1] whose training loss is logged apart; 0: none",
        json_schema_extra=IF_SET,
    )  # fmt: skip

    @model_validator(mode="after")
    def _blocks_exist(self) -> FlowMatchingConfig:
        depth, repa = self.network.depth, self.repa
        if repa is not None and repa.layer >= depth:
            raise ValueError(f"repa.layer={repa.layer} but the network has depth={depth} blocks; lower it")
        if repa is not None and (repa.target_layer or 0) >= depth:
            raise ValueError(
                f"repa.target_layer={repa.target_layer} but the network has depth={depth} blocks; lower it"
            )
        for tread in (self.tread, *(phase.tread for phase in self.curriculum)):
            if tread is None:
                continue
            if tread.last >= depth:
                raise ValueError(f"tread.last={tread.last} but the network has depth={depth} blocks; lower it")
            if repa is not None and tread.first <= repa.layer <= tread.last and repa.projector == "conv":
                raise ValueError(
                    f"repa.layer={repa.layer} lies between tread.first={tread.first} and tread.last={tread.last}, where "
                    "tokens are missing from the grid a conv projector needs; align outside, or with projector: mlp"
                )
        return self

    @model_validator(mode="after")
    def _cut_whole(self) -> FlowMatchingConfig:
        copied = self.lora or (self.validation and self.validation.patience) or (self.repa and self.repa.kind == "self")
        if self.train.shard and copied:
            raise ValueError(
                "train.shard cuts networks trained whole; with lora, validation.patience or repa.kind=self set it to false"
            )
        return self

    @model_validator(mode="after")
    def _looks_at_log_rows(self) -> FlowMatchingConfig:
        every, row = self.validation.every if self.validation else 0, self.train.log_every
        if every % row:
            raise ValueError(f"validation.every={every} is not a multiple of train.log_every={row}; make it one")
        return self

    @model_validator(mode="after")
    def _phases_follow(self) -> FlowMatchingConfig:
        if self.curriculum:
            from models.pretraining.curriculum import phases_of

            phases_of(self)  # refuses phases it cannot place
        return self

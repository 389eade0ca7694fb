"""Settings of preference tuning."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from infra.config import Config
from infra.stages import IF_SET
from models.engine.config import OptimizerConfig, TrainConfig
from models.evaluation.config import HubReward
from models.networks.config import LoraConfig
from models.posttraining.guard_config import GuardConfig, check_looks
from models.pretraining.config import SelectConfig, TimestepConfig


class PairsConfig(Config):
    """Preference pairs from the model's own pictures: best and worst of a group under a reward."""

    name: str = Field(default="pairs", pattern=r"^[a-z0-9-]+$", description="Name of the stage")
    prompts: int = Field(default=160, ge=2, description="Training prompts; more than there are ask all again")
    group: int = Field(default=4, ge=2, description="Pictures per prompt")
    steps: int = Field(default=8, ge=1, description="Euler steps of the rollouts")
    guidance: float = Field(default=2.0, ge=1, description="Guidance of the rollouts, as at inference")
    min_gap: float = Field(default=0.05, ge=0, description="Reward gap below which a pair is a tie and dropped")
    seed: int = Field(default=0, ge=0, description="Seed of prompts and noise")
    source: Literal["judge", "data"] = Field(
        default="judge", json_schema_extra=IF_SET,
        description="judge: best and worst of a group; data: a curated picture against the model's for its caption (SPIN)",
    )  # fmt: skip
    hub: HubReward | None = Field(
        default=None, json_schema_extra=IF_SET,
        description="Reward that ranks a group instead of the demo's judge; on data of one's own it draws their captions",
    )  # fmt: skip

    @model_validator(mode="after")
    def _one_source(self) -> PairsConfig:
        if self.hub is not None and self.source == "data":
            raise ValueError("pairs: source data compares with curated pictures and asks no reward; set hub to null")
        return self


class ImportPairsConfig(Config):
    """Preference pairs of other people: a Parquet table as Pick-a-Pic or HPD publish them."""

    name: str = Field(default="pairs-table", pattern=r"^[a-z0-9-]+$", description="Name of the stage")
    table: str = Field(min_length=1, description="Parquet file; pictures as bytes in it or as paths beside it")
    side: int = Field(default=32, ge=8, description="Side of the squares that pictures are cut to, in pixels")
    held_out: float = Field(default=0.1, ge=0, lt=1, description="Share of the prompts that nothing trains on")
    source: str = Field(default="imported", min_length=1, description="What the pairs are called in the table")
    fingerprint: str = Field(default="", description="Change it when the table's contents change")
    seed: int = Field(default=0, ge=0, description="Seed of the split")


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
    anchor: float = Field(default=0.25, ge=0, description="Weight of flow matching on the winners, in units of beta/2")
    guard: GuardConfig | None = Field(default=None, description="Stops reward hacking; null: no guard")
    lora: LoraConfig | None = Field(
        default=None, description="Train adapters of these layers only; null: all weights", json_schema_extra=IF_SET
    )

    @model_validator(mode="after")
    def _looks_at_log_rows(self) -> DpoConfig:
        check_looks(self.guard, self.train)
        return self


class RewardTerm(Config):
    """One reward to train on."""

    kind: Literal["judge", "model", "sharpness", "hub"] = Field(
        default="judge",
        description="judge: the colour judge; model: the trained reward model; sharpness: a rule; hub: PickScore, HPS, CLIP",
    )
    weight: float = Field(default=1.0, gt=0, description="Weight of its normalised advantage")
    hub: HubReward | None = Field(default=None, description="hub: which model", json_schema_extra=IF_SET)

    @model_validator(mode="after")
    def _model_of_the_hub(self) -> RewardTerm:
        if (self.kind == "hub") != (self.hub is not None):
            raise ValueError(f"reward of kind {self.kind!r}: kind hub and a model under hub go together; give both")
        if self.hub is not None and self.hub.role != "trained":
            raise ValueError(f"reward {self.hub.label!r} is held out and only watches; train on another one")
        return self


class PromptsConfig(Config):
    """Prompts of the rollouts: published scenes, so that held-out ones stay unseen."""

    count: int = Field(default=320, ge=1, description="Distinct prompts")
    side: int = Field(default=32, ge=8, description="Side of the pictures in pixels")


class OnlineConfig(Config):
    """What training on the model's own pictures has in common."""

    train: TrainConfig = TrainConfig(
        steps=100, batch_size=32, ema_gamma=6.0, log_every=10,
        optimizer=OptimizerConfig(muon_lr=5e-4, adamw_lr=5e-5, warmup_steps=5, final_ratio=0.2),
    )  # fmt: skip
    prompts: PromptsConfig = PromptsConfig()
    rewards: tuple[RewardTerm, ...] = Field(default=(RewardTerm(),), min_length=1, description="Rewards to train on")
    guard: GuardConfig | None = Field(default=GuardConfig(), description="Stops reward hacking; null: no guard")
    lora: LoraConfig | None = Field(
        default=None, description="Train adapters of these layers only; null: all weights", json_schema_extra=IF_SET
    )

    @model_validator(mode="after")
    def _looks_at_log_rows(self) -> OnlineConfig:
        check_looks(self.guard, self.train)
        watching = None if self.guard is None else self.guard.held_out
        for term in self.rewards:
            if watching is not None and term.hub is not None and term.hub.model == watching.model:
                raise ValueError(f"guard.held_out is {watching.model}, which is trained on too; watch by another model")
        return self


class GroupedConfig(OnlineConfig):
    """Training on groups of pictures of one prompt."""

    group: int = Field(default=8, ge=2, description="Pictures per prompt; advantages are relative to the group's mean")
    unit: Literal["group", "batch"] = Field(
        default="batch", description="Unit of an advantage: the group's own deviation, or that pooled over the batch"
    )

    @model_validator(mode="after")
    def _whole_groups(self) -> GroupedConfig:
        size = self.train.batch_size
        if size % self.group:
            raise ValueError(
                f"train.batch_size={size} is not a multiple of group={self.group}; make it one, e.g. "
                f"{max(1, size // self.group) * self.group}"
            )
        return self


class GrpoConfig(GroupedConfig):
    """Flow-GRPO. The rollouts' guidance is the checkpoint's own, in training too."""

    name: str = Field(default="grpo", pattern=r"^[a-z0-9-]+$", description="Name of the stage")
    steps: int = Field(default=4, ge=2, description="Steps of the rollouts, fewer than at inference")
    sampler: Literal["flow_sde", "cps", "ou"] = Field(
        default="ou", description="Stochastic step, models/posttraining/sde.py"
    )
    eta: float = Field(default=0.7, gt=0, le=1.5, description="Noise of the stochastic steps")
    window: int = Field(default=2, ge=1, description="Stochastic steps; the others follow the ODE and are not trained")
    window_moves: Literal["stays", "random", "progressive"] = Field(
        default="stays", description="stays: the first steps; random: anew each step; progressive: on by one in time"
    )
    window_every: int = Field(default=25, ge=1, description="Training steps after which a progressive window moves")
    window_from: int = Field(default=0, ge=0, description="First step that may be stochastic", json_schema_extra=IF_SET)
    guidance: float | None = Field(
        default=None, ge=1, json_schema_extra=IF_SET,
        description="Guidance of rollouts and training; null: the checkpoint's own",
    )  # fmt: skip
    same_noise: bool = Field(default=False, description="One first noise for the whole group, computed once")
    updates: int = Field(default=1, ge=1, description="Moves per batch of rollouts")
    clip_range: float = Field(default=1e-3, gt=0, description="Clip of the ratio; log-probabilities are per element")
    kl: float = Field(default=0.0, ge=0, description="Weight of the KL to the reference, per element and step")

    @model_validator(mode="after")
    def _window_fits(self) -> GrpoConfig:
        if self.window_from + self.window >= self.steps:
            raise ValueError(
                f"window={self.window} from step {self.window_from} of steps={self.steps}: the last step adds no noise; "
                f"let it end by step {self.steps - 1}"
            )
        if self.sampler == "cps" and self.eta >= 1:
            raise ValueError(f"eta={self.eta} with cps keeps nothing of x_t; choose eta below 1")
        return self


class NftConfig(GroupedConfig):
    """DiffusionNFT."""

    name: str = Field(default="nft", pattern=r"^[a-z0-9-]+$", description="Name of the stage")
    timesteps: TimestepConfig = TimestepConfig()
    steps: int = Field(default=4, ge=1, description="Euler steps of the rollouts")
    guidance: float = Field(default=1.0, ge=1, description="Guidance of the rollouts; the paper uses none")
    beta: float = Field(default=1.0, gt=0, le=1, description="How far the implicit policies lie from the old one")
    kl: float = Field(default=1e-4, ge=0, description="Weight of the squared velocity change from the reference")
    old_rate: float = Field(default=1e-3, gt=0, description="Growth a step of the share the old policy keeps of itself")
    old_most: float = Field(default=0.5, ge=0, lt=1, description="Largest share the old policy keeps of itself")


class ReflConfig(OnlineConfig):
    """ReFL with the pre-training term."""

    name: str = Field(default="refl", pattern=r"^[a-z0-9-]+$", description="Name of the stage")
    timesteps: TimestepConfig = TimestepConfig()
    select: SelectConfig = Field(default=SelectConfig(), description="Pictures of the pre-training term")
    steps: int = Field(default=8, ge=2, description="Euler steps of the rollouts, as at inference")
    late: float = Field(default=0.5, gt=0, le=1, description="Share of the steps, the last ones, that may get gradient")
    hinge: float = Field(default=2.0, description="Sigmas above the start's mean where the reward stops pulling")
    weight: float = Field(default=0.05, gt=0, description="Weight of the hinge, in sigmas")
    pretraining: float = Field(default=1.0, ge=0, description="Weight of flow matching on real pictures")


class RewardModelConfig(Config):
    """Bradley-Terry reward model, taught by captioned pictures first and then by preferences beside them."""

    name: str = Field(default="reward-model", pattern=r"^[a-z0-9-]+$", description="Name of the stage")
    train: TrainConfig = TrainConfig(
        steps=800, batch_size=64, ema_gamma=6.0, log_every=20,
        optimizer=OptimizerConfig(muon_lr=None, adamw_lr=3e-3, weight_decay=0.05, warmup_steps=20),
    )  # fmt: skip
    side: int = Field(default=32, ge=16, multiple_of=8, description="Side that pictures are averaged down to")
    width: int = Field(default=16, ge=8, multiple_of=8, description="Channels of the first convolution")
    features: int = Field(default=128, ge=1, description="Features that picture and prompt are compared by")
    alignment: float = Field(default=1.0, ge=0, description="Weight of captioned pictures; 0: preferences alone")
    alone: float = Field(default=0.4, ge=0, lt=1, description="Share of the steps that they teach before preferences")
    near: int = Field(
        default=0, ge=0, description="Half have one of so many nearest captions", json_schema_extra=IF_SET
    )
    validation: float = Field(default=0.4, gt=0, lt=1, description="Share of the prompts that are not trained on")
    calibration: float = Field(default=0.1, gt=0, lt=1, description="Share of these that fits the temperature")
    label_noise: float = Field(default=0.0, ge=0, lt=0.5, description="Share of the pairs turned round on purpose")
    label_scale: float | None = Field(default=None, gt=0, description="Labels drawn with sigmoid(strength / this)")


class PromptCheckConfig(Config):
    """Short prompts drawn as typed and as rewritten, with the same noise, judged by what was typed."""

    name: str = Field(default="prompt-check", pattern=r"^[a-z0-9-]+$", description="Name of the stage")
    prompts: int = Field(default=120, ge=4, description="Short prompts, shared by their kinds")
    seed: int = Field(default=4321, ge=0, description="Seed of prompts and noise")
    batch_size: int = Field(default=8, ge=1, description="Pictures sampled at a time")


class PromptEnhancerConfig(Config):
    """A language model that rewrites prompts: trained on the captions, or any instruct model."""

    name: str = Field(default="prompt-enhancer", pattern=r"^[a-z0-9-]+$", description="Name of the stage")
    train: TrainConfig = TrainConfig(
        steps=700, batch_size=32, ema_gamma=6.0, log_every=20,
        optimizer=OptimizerConfig(muon_lr=None, adamw_lr=4e-3, warmup_steps=20, decay_from=0.3, final_ratio=0.02),
    )  # fmt: skip
    target: Literal["short", "long"] = Field(
        default="short", description="Captions that prompts are rewritten to: those the model was mostly trained on"
    )
    width: int = Field(default=96, ge=8, description="Width of the small model; a multiple of heads")
    depth: int = Field(default=2, ge=1, description="Layers of the small model")
    heads: int = Field(default=4, ge=1, description="Attention heads of the small model")
    vocabulary: int = Field(default=512, ge=300, description="Tokens of its byte-level BPE")
    instruct: str | None = Field(
        default=None, description="Folder or hub name of a chat model that rewrites instead; nothing is trained"
    )
    new_tokens: int = Field(default=160, ge=8, description="Longest answer of the chat model in tokens")
    seconds: float = Field(default=20.0, gt=0, description="Longest time of an answer of the chat model")
    max_tokens: int = Field(default=64, ge=8, description="Longest rewrite in tokens of the text encoder")
    language: str = Field(default="en", min_length=2, description="Language of prompts too short to tell")
    check: PromptCheckConfig | None = Field(
        default=PromptCheckConfig(), description="What rewriting does to pictures; null: not measured",
        json_schema_extra={"versioned": False},
    )  # fmt: skip

    @model_validator(mode="after")
    def _heads_fit(self) -> PromptEnhancerConfig:
        if self.width % self.heads:
            raise ValueError(f"width={self.width} is not a multiple of heads={self.heads}; make it one")
        return self

"""The configuration of a whole lifecycle: one stage configuration per stage, and where to run."""

from __future__ import annotations

from collections import Counter
from typing import Literal

from pydantic import Field, model_validator

from data_curation.config import DataConfig
from flows.judged import asking
from infra.config import Config
from infra.stages import UNVERSIONED, Resources
from models.distillation.config import DistillConfig, PairStoreConfig
from models.personalization.config import DreamBoothConfig, MixConfig, SweepConfig
from models.posttraining.config import (
    DpoConfig,
    GrpoConfig,
    ImportPairsConfig,
    NftConfig,
    PairsConfig,
    PromptEnhancerConfig,
    ReflConfig,
    RewardModelConfig,
)
from models.pretraining.autoencoder_config import AutoencoderConfig
from models.pretraining.config import FlowMatchingConfig
from tasks.config import (
    CompareConfig,
    DistributionConfig,
    EvaluateConfig,
    ExportConfig,
    JudgeConfig,
    ModelConfig,
    ReportConfig,
)

MODEL = "model"  # the stage that reads a foreign one


class PosttrainConfig(Config):
    """What follows pre-training: SFT, then branches that all start from it; a stage that is null is left out."""

    sft: FlowMatchingConfig | None = Field(
        default=FlowMatchingConfig(name="sft", repa=None), description="Supervised fine-tuning on long prompts"
    )
    pairs: PairsConfig = Field(default=PairsConfig(), description="Preference pairs of the model's own pictures")
    pairs_table: ImportPairsConfig | None = Field(default=None, description="A published table instead of own pairs")
    reward_model: RewardModelConfig | None = Field(default=None, description="Reward model trained on those pairs")
    grpo: GrpoConfig | None = Field(default=None, description="Flow-GRPO")
    nft: NftConfig | None = Field(default=None, description="DiffusionNFT")
    refl: ReflConfig | None = Field(default=None, description="ReFL")
    dpo: DpoConfig | None = Field(default=DpoConfig(), description="Diffusion-DPO on those pairs")
    prompt_enhancer: PromptEnhancerConfig | None = Field(default=None, description="Rewriting of prompts")
    hands_on: str | None = Field(
        default=None, description="Branch that later stages start from; null: the last of grpo, nft, refl, dpo"
    )

    @property
    def online(self) -> tuple[GrpoConfig | NftConfig | ReflConfig, ...]:
        """The branches that learn from their own pictures."""
        return tuple(stage for stage in (self.grpo, self.nft, self.refl) if stage is not None)

    @property
    def branches(self) -> tuple[str, ...]:
        """Names of all branches, in the order in which they run."""
        return (*(stage.name for stage in self.online), *(() if self.dpo is None else (self.dpo.name,)))

    @property
    def pairs_name(self) -> str:
        """The stage that makes or reads the pairs."""
        return self.pairs.name if self.pairs_table is None else self.pairs_table.name

    @property
    def needs_pairs(self) -> bool:
        """Whether a stage reads preference pairs."""
        return self.dpo is not None or self.reward_model is not None

    @model_validator(mode="after")
    def _branches_fit(self) -> PosttrainConfig:
        if self.hands_on is not None and self.hands_on not in self.branches:
            raise ValueError(f"hands_on={self.hands_on!r} is no branch; choose one of {list(self.branches)} or null")
        for stage in self.online:
            if self.reward_model is None and any(term.kind == "model" for term in stage.rewards):
                raise ValueError(f"stage {stage.name!r} trains on the reward model; set posttrain.reward_model")
        return self


class StageResources(Config):
    """What one stage runs on in place of the run's own resources; null: as the run."""

    num_workers: int | None = Field(default=None, ge=1, le=4096, description="Training processes, one per device")
    threads_per_worker: int | None = Field(default=None, ge=1, le=1024, description="CPU threads of each")
    device: Literal["auto", "cpu", "cuda"] | None = Field(
        default=None, description="auto takes CUDA where there is one"
    )
    image: str | None = Field(default=None, description="Container image of its job")
    hourly_price: float | None = Field(default=None, ge=0, description="What a worker costs an hour")


class RunConfig(Config):
    """Where a run keeps its results and what it runs on; none of it changes results."""

    root: str = Field(default="runs", description="Folder, file:// or s3:// address", json_schema_extra=UNVERSIONED)
    resources: Resources = Field(
        default=Resources(), description="Processes and devices", json_schema_extra=UNVERSIONED
    )
    per_stage: dict[str, StageResources] = Field(
        default={}, description="Stages that run on something else, with launcher rayjob", json_schema_extra=UNVERSIONED
    )
    min_free_gb: float = Field(
        default=1.0, ge=0, description="Refuse to start with less free disk", json_schema_extra=UNVERSIONED
    )

    def resources_of(self, stage: str) -> Resources:
        """What a stage runs on."""
        own = self.per_stage.get(stage)
        return self.resources if own is None else self.resources.model_copy(update=own.model_dump(exclude_none=True))

    @model_validator(mode="after")
    def _jobs_only(self) -> RunConfig:
        own = next(iter(self.per_stage), None)
        if self.resources.launcher != "rayjob" and (own is not None or self.resources.image is not None):
            what = f"per_stage.{own}" if own is not None else "resources.image"
            raise ValueError(
                f"run.{what} is for stages that are Ray jobs; with launcher={self.resources.launcher} all share one group of "
                "workers, set launcher to rayjob or leave it out"
            )
        return self


class LifecycleConfig(Config):
    """The whole life of one model: every stage's configuration, in the order in which they run."""

    name: str = Field(default="demo", pattern=r"^[a-z0-9][a-z0-9-]*$", description="Name of the runs")
    seed: int = Field(default=0, ge=0, description="Added to the seed of every training stage; data stay the same")
    data: DataConfig = Field(default=DataConfig(), description="Curation")
    judge: JudgeConfig | None = Field(
        default=JudgeConfig(),
        description="The judge of the demo's scenes; null: own data, which nothing here judges by them",
    )
    model: ModelConfig | None = Field(
        default=None, description="Foreign diffusers pipeline to start from, a folder or hub id; null: from scratch"
    )
    autoencoder: AutoencoderConfig | None = Field(
        default=None, description="A VAE of one's own, in whose latents the model is trained; null: pixels"
    )
    pretrain: tuple[FlowMatchingConfig, ...] = Field(
        default=(FlowMatchingConfig(),),
        description="Pre-training and continued training, each from the last",
    )
    posttrain: PosttrainConfig = Field(default=PosttrainConfig(), description="SFT and preference tuning")
    personalize: tuple[DreamBoothConfig, ...] = Field(default=(), description="Subjects to learn")
    personalize_from: str | None = Field(
        default=None, description="Stage they start from; null: the last of post-training"
    )
    mix: tuple[MixConfig, ...] = Field(default=(), description="Several subjects in one model")
    sweep: tuple[SweepConfig, ...] = Field(
        default=(), description="One subject with several ranks, lengths and weights"
    )
    distill: tuple[DistillConfig, ...] = Field(default=(), description="Students")
    distill_from: str | None = Field(default=None, description="Their teacher's stage; null: the last of post-training")
    distill_pairs: tuple[PairStoreConfig, ...] = Field(
        default=(), description="Stored pairs of the teacher, for the methods that learn from them"
    )
    compare: CompareConfig | None = Field(default=None, description="Students against their teacher, step by step")
    evaluate: EvaluateConfig = Field(default=EvaluateConfig(), description="Scores and gates")
    distribution: DistributionConfig | None = Field(
        default=None, description="Pictures against held-out ones on an embedding; works without the demo's scenes"
    )
    export: ExportConfig = Field(default=ExportConfig(), description="Stock pipelines")
    report: ReportConfig = Field(default=ReportConfig(), description="The page that shows it all")
    run: RunConfig = Field(default=RunConfig(), description="Where and how", json_schema_extra=UNVERSIONED)

    @property
    def by_scenes(self) -> bool:
        """Whether the judge of the demo's scenes is asked; a foreign model does not know them."""
        return self.judge is not None and self.model is None

    @property
    def trunk(self) -> tuple[str, ...]:
        """Names of the stages that hand the model on before post-training branches, first to last."""
        foreign = () if self.model is None else (MODEL,)
        sft = () if self.posttrain.sft is None else (self.posttrain.sft.name,)
        return (*foreign, *(stage.name for stage in self.pretrain), *sft)

    @property
    def chain(self) -> tuple[str, ...]:
        """Names of the stages that hand the model on, first to last."""
        post = self.posttrain
        chosen = post.hands_on or (post.branches[-1] if post.branches else None)
        return self.trunk if chosen is None else (*self.trunk, chosen)

    @property
    def checkpoints(self) -> tuple[str, ...]:
        """Names of every stage that makes a checkpoint."""
        subjects = (*(stage.name for stage in self.personalize), *(mix.name for mix in self.mix))
        return (*self.trunk, *self.posttrain.branches, *subjects, *(stage.name for stage in self.distill))

    @model_validator(mode="after")
    def _starts_somewhere(self) -> LifecycleConfig:
        if self.model is None and not self.pretrain:
            raise ValueError("pretrain is empty and there is no model to start from; give one of them")
        if self.autoencoder is not None and (self.model is not None or self.personalize or self.mix or self.distill):
            raise ValueError("models in an autoencoder's latents are pre-trained and post-trained; set model to null, "
                             "personalize, mix and distill to []")  # fmt: skip
        detector = self.evaluate.detector
        if self.by_scenes and detector is not None and detector.clip is None:
            raise ValueError("evaluate.detector names the backgrounds of the demo's scenes too; give it a clip")
        if not self.by_scenes and (asked := asking(self)):
            why = (
                "judge is null" if self.model is None else "the judge knows the demo's scenes, a foreign model does not"
            )
            raise ValueError(f"{why}; change {'; '.join(asked)}")
        if self.model is not None and (self.personalize or self.mix or self.distill):
            raise ValueError(
                "a foreign model is tuned (pretrain, sft, dpo, grpo, nft, refl) and exported; "
                "set personalize, mix and distill to [] or model to null"
            )
        return self

    @model_validator(mode="after")
    def _names_fit(self) -> LifecycleConfig:
        swept = (name for sweep in self.sweep for name in (sweep.name, *sweep.variant_names))
        twice = [name for name, count in Counter((*self.checkpoints, *swept)).items() if count > 1]
        if twice:
            raise ValueError(f"stage name {twice[0]!r} is used twice; give every stage its own name")
        self._distillation_fits()
        self._subjects_fit()
        taught = set(self.data.encode.teacher_resolutions)
        for stage in self.pretrain:
            if (
                stage.repa is not None
                and stage.repa.needs_cached_features
                and (missing := sorted(set(stage.select.resolutions) - taught))
            ):
                raise ValueError(
                    f"stage {stage.name!r} aligns to teacher features at {missing}, which data.encode.teacher_resolutions="
                    f"{self.data.encode.teacher_resolutions} does not make; add them there or set repa to null"
                )
        for field in ("personalize_from", "distill_from"):
            start = getattr(self, field)
            known = [*dict.fromkeys([*self.chain, *self.posttrain.branches])]
            if start is not None and start not in known:
                raise ValueError(f"{field}={start!r} is no stage of pre- or post-training; choose one of {known}")
        return self

    def _subjects_fit(self) -> None:
        learnt = [stage.name for stage in self.personalize]
        textual = {stage.name for stage in self.personalize if stage.text is not None}
        for mix in self.mix:
            if unknown := sorted(set(mix.adapters) - set(learnt)):
                raise ValueError(
                    f"mix {mix.name!r} names {unknown}, which is no personalize stage; choose from {learnt}"
                )
            whole = [stage.name for stage in self.personalize if stage.lora is None and stage.name in mix.adapters]
            if whole:
                raise ValueError(f"mix {mix.name!r} names {whole}, which train all weights (lora: null); mix adapters")
            if tuned := sorted(name for name in mix.adapters if name in textual):
                raise ValueError(
                    f"mix {mix.name!r} names {tuned}, which tune text encoders (text); a mix has the base's"
                )
        for sweep in self.sweep:
            if sweep.stage not in learnt:
                raise ValueError(
                    f"sweep {sweep.name!r} varies {sweep.stage!r}, which is no personalize stage; choose from {learnt}"
                )
            if sweep.stage in textual:
                raise ValueError(
                    f"sweep {sweep.name!r} varies {sweep.stage!r}, which tunes text encoders; set text to null"
                )

    def _distillation_fits(self) -> None:
        stores, before = [store.name for store in self.distill_pairs], set[str]()
        for stage in self.distill:
            if stage.start is not None and stage.start not in before:
                raise ValueError(
                    f"stage {stage.name!r} starts from {stage.start!r}, which is no student before it; "
                    f"choose one of {sorted(before)} or null"
                )
            if stage.needs_pairs and (stage.pairs not in stores if stage.pairs else not stores):
                raise ValueError(
                    f"stage {stage.name!r} learns from stored pairs, but distill_pairs has {stores}; "
                    f"add {stage.pairs or 'one'} there"
                )
            before.add(stage.name)

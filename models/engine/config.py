"""Settings of the training loop, shared by every technique."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, model_validator

from infra.config import Config
from infra.stages import IF_SET, UNVERSIONED

Decay: TypeAlias = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Config):
    """Muon for hidden matrices, AdamW for everything else; set `muon_lr` to null for AdamW alone."""

    muon_lr: float | None = Field(default=0.01, gt=0, description="Muon learning rate (update RMS matched to AdamW)")
    adamw_lr: float = Field(default=1.5e-3, gt=0, description="AdamW learning rate")
    betas: tuple[Decay, Decay] = Field(default=(0.9, 0.95), description="AdamW moment decays")
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled weight decay of both optimizers")
    warmup_steps: int = Field(default=50, ge=0, description="Steps of linear warm-up")
    decay_from: float = Field(
        default=0.5, ge=0, le=1, description="Share of the run after which the rate falls linearly"
    )
    final_ratio: float = Field(default=0.01, ge=0, le=1, description="Learning rate at the last step over the peak")
    clip_norm: float = Field(default=1.0, gt=0, description="Gradient norm above which gradients are scaled down")


class TrainConfig(Config):
    """How long, how much at once, and what is kept."""

    steps: int = Field(default=3000, ge=1, description="Optimizer steps")
    batch_size: int = Field(default=24, ge=1, description="Pictures per step over all workers")
    seed: int = Field(default=0, ge=0, description="Root of all randomness of this stage")
    optimizer: OptimizerConfig = OptimizerConfig()
    ema_gamma: float = Field(default=17.0, ge=0, description="Power EMA (1-1/(k+1))^gamma; 0 keeps the last weights")
    log_every: int = Field(default=20, ge=1, description="Steps between rows of metrics.jsonl")
    checkpoint_every: int = Field(
        default=200, ge=1, description="Steps between checkpoints", json_schema_extra={"versioned": False}
    )
    sample_every: int | None = Field(default=None, ge=1, description="Steps between grids of fixed prompts")
    accumulate: int = Field(
        default=1, ge=1, description="Parts a worker's batch is computed in, one after the other, before a step",
        json_schema_extra=IF_SET,
    )  # fmt: skip
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32", description="bf16: autocast; weights, averages, times and losses stay fp32",
        json_schema_extra=IF_SET,
    )  # fmt: skip
    non_finite: Literal["skip", "stop"] = Field(
        default="skip", description="A gradient that is not finite: leave the step out, or end the run",
        json_schema_extra=IF_SET,
    )  # fmt: skip
    ema_decay: float | None = Field(
        default=None, gt=0, lt=1, description="Constant EMA instead, warmed up as min(decay, (1 + n) / (10 + n))",
        json_schema_extra=IF_SET,
    )  # fmt: skip
    ema_snapshot_every: int | None = Field(
        default=None, ge=1, description="Steps between snapshots of two power EMAs, for an average chosen afterwards",
        json_schema_extra=IF_SET,
    )  # fmt: skip
    recompute: bool = Field(
        default=False, description="Keep no activations of a block, compute them again in the backward pass",
        json_schema_extra=IF_SET,
    )  # fmt: skip
    compile: bool = Field(default=False, description="torch.compile every block", json_schema_extra=IF_SET)
    shard: bool = Field(
        default=False, description="Cut every block's weights over the workers (FSDP2) in place of a copy on each",
        json_schema_extra=UNVERSIONED,
    )  # fmt: skip
    loader_threads: int = Field(
        default=0, ge=0, le=64, description="Threads that make batches ahead; 0: the training thread makes them",
        json_schema_extra=UNVERSIONED,
    )  # fmt: skip

    @model_validator(mode="after")
    def _checkpoints_at_log_rows(self) -> TrainConfig:
        if self.checkpoint_every % self.log_every:
            raise ValueError(
                f"checkpoint_every={self.checkpoint_every} is not a multiple of log_every={self.log_every}; "
                "a checkpoint between two log rows could not resume the log exactly"
            )
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of accumulate={self.accumulate}; make it one"
            )
        return self

"""A stage: a function, the part of its configuration that changes results, and its inputs; the key is their digest."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from pydantic import Field

from infra.artifacts import Artifact
from infra.config import Config, digest_of
from infra.errors import ConfigError

T = TypeVar("T")
R = TypeVar("R")

UNVERSIONED: dict[str, Any] = {"versioned": False}
IF_SET: dict[str, Any] = {"versioned": "if set"}  # for fields added to a stage whose results are out there


class Resources(Config):
    """Where and how wide a stage runs; none of this changes results."""

    launcher: Literal["inprocess", "ray", "rayjob"] = Field(
        default="inprocess",
        description="inprocess: this process; ray: workers of a local or given Ray; rayjob: the Ray Jobs API",
        json_schema_extra=UNVERSIONED,
    )
    num_workers: int = Field(
        default=1, ge=1, le=4096, description="training processes, one per device", json_schema_extra=UNVERSIONED
    )
    threads_per_worker: int = Field(
        default=1,
        ge=1,
        le=1024,
        description="CPU threads each training process computes with",
        json_schema_extra=UNVERSIONED,
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto takes CUDA where there is one", json_schema_extra=UNVERSIONED
    )
    ray_address: str | None = Field(
        default=None, description="address of a running Ray; empty starts a local one", json_schema_extra=UNVERSIONED
    )
    image: str | None = Field(
        default=None, description="rayjob: container image of the job and its workers (Ray's image_uri); empty: the node's",
        json_schema_extra=UNVERSIONED,
    )  # fmt: skip
    hourly_price: float | None = Field(
        default=None, ge=0, description="what a worker costs an hour, in any currency; the plan says what that comes to",
        json_schema_extra=UNVERSIONED,
    )  # fmt: skip


DEVICE_VARIABLE = "T2I_DEVICE"  # how a process is told its `Resources.device`


class StageSpec(Config):
    """Everything needed to run one stage anywhere; it is written as JSON beside the run."""

    name: str = Field(pattern=r"^[a-z][a-z0-9]*(-[a-z0-9]+)*$", description="unique in a plan; a folder of the root")
    function: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="key in tasks/catalog.py")
    version: int = Field(default=1, ge=1, description="raised when the meaning of the function changes")
    kind: str = Field(description="kind of the artifact it makes")
    config: dict[str, Any] = Field(default_factory=dict, description="the full configuration as JSON")
    versioned: dict[str, Any] = Field(default_factory=dict, description="the part of it that changes results")
    inputs: dict[str, str] = Field(default_factory=dict, description="role -> name of the stage that fills it")
    runs: Literal["local", "train"] = Field(default="local", description="local: called once; train: on every worker")


def stage_key(spec: StageSpec, input_digests: Mapping[str, str]) -> str:
    """sha256 of what decides a stage's result: name, function, version, versioned configuration, input digests by role."""
    if set(spec.inputs) != set(input_digests):
        wanted, given = sorted(spec.inputs), sorted(input_digests)
        raise ConfigError(f"stage {spec.name!r} needs inputs {wanted}, got {given}; check the plan's roles")
    return digest_of(
        {
            "name": spec.name,
            "function": spec.function,
            "version": spec.version,
            "kind": spec.kind,
            "config": spec.versioned,
            "inputs": dict(input_digests),
        }
    )


class FanOut(Protocol):
    """Apply a picklable module-level function to every item, on Ray or here; results keep the order of the items."""

    def __call__(self, function: Callable[[T], R], items: Sequence[T], /) -> list[R]: ...


def fan_out_here(function: Callable[[T], R], items: Sequence[T], /) -> list[R]:
    """The FanOut that stays in this process."""
    return [function(item) for item in items]


def no_progress(done: int, total: int, metrics: Mapping[str, float]) -> None:
    """The progress callback that tells nobody."""


@dataclass
class StageContext:
    """What a stage function may touch: verified inputs, its output folder, a scratch folder, and two callbacks."""

    name: str
    inputs: Mapping[str, Path]  # role -> verified local folder
    parents: Mapping[str, Artifact]  # role -> artifact
    out: Path  # what rank 0 writes here is committed
    scratch: Path  # survives a kill: training checkpoints, downloaded shards
    resources: Resources
    progress: Callable[[int, int, Mapping[str, float]], None]  # (done, total, metrics)
    fan_out: FanOut
    root: str | None = None  # of the store, where what was encoded once is kept; None: nothing is kept

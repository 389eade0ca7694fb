"""One stage, brought to its artifact: reuse it, or run its function in a scratch folder and commit what it wrote."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from datetime import UTC, datetime
from typing import Any, Literal, Protocol

from pydantic import Field

from infra.artifacts import EVENTS, Artifact
from infra.config import Config
from infra.errors import LifecycleError
from infra.logging import stage_log
from infra.memory import forget_peak_memory, peak_memory
from infra.provenance import provenance
from infra.stages import DEVICE_VARIABLE, FanOut, Resources, StageContext, StageSpec, fan_out_here, stage_key
from infra.storage import Store
from tasks.catalog import Catalog, stage_function

log = logging.getLogger(__name__)

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

Status = Literal["ran", "reused"]
Report = Callable[[str, int, int, Mapping[str, float]], None]  # (stage, done, total, metrics)


class Job(Config):
    """Everything one execution of a stage needs, in any process on any machine; travels as JSON."""

    spec: StageSpec = Field(description="the stage")
    key: str = Field(description="its content key")
    root: str = Field(description="root of the store")
    inputs: dict[str, Artifact] = Field(default_factory=dict, description="role -> artifact")
    resources: Resources = Field(default=Resources(), description="where and how wide")


class Launcher(Protocol):
    """Where jobs run. `run` blocks until the artifact is committed; `close` stops whatever still runs."""

    def run(self, job: Job, report: Report) -> Artifact: ...
    def close(self) -> None: ...


def silent(stage: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
    """The report that tells nobody."""


def inputs_of(spec: StageSpec, artifacts: Mapping[str, Artifact]) -> dict[str, Artifact]:
    """Role -> artifact, from the artifacts of the stages before."""
    missing = sorted({stage for stage in spec.inputs.values() if stage not in artifacts})
    if missing:
        raise LifecycleError(
            f"stage {spec.name!r} needs the artifacts of {missing}, which are not there; run them first"
        )
    return {role: artifacts[stage] for role, stage in spec.inputs.items()}


def job_of(spec: StageSpec, store: Store, artifacts: Mapping[str, Artifact], resources: Resources) -> Job:
    """The job that would make `spec`'s artifact from these inputs."""
    inputs = inputs_of(spec, artifacts)
    key = stage_key(spec, {role: artifact.digest for role, artifact in inputs.items()})
    return Job(spec=spec, key=key, root=store.root, inputs=inputs, resources=resources)


def materialise(
    spec: StageSpec,
    store: Store,
    artifacts: Mapping[str, Artifact],
    resources: Resources,
    launcher: Launcher,
    force: bool = False,
    report: Report = silent,
) -> tuple[Artifact, Status]:
    """The stage's artifact, found under its key or made now; `force` discards a found one first."""
    job = job_of(spec, store, artifacts, resources)
    if force:
        store.discard_entry(spec.name, job.key)
    elif (found := store.find(spec.name, job.key)) is not None:
        return found, "reused"
    return launcher.run(job, report), "ran"


def perform(
    job: Job,
    store: Store,
    catalog: Catalog = stage_function,
    report: Report = silent,
    fan_out: FanOut = fan_out_here,
    rank: int = 0,
) -> Artifact | None:
    """Run the job's function in this process; rank 0 commits. A failure leaves the scratch folder for the next try."""
    spec = job.spec
    scratch = store.scratch(spec.name, job.key)
    out, work = scratch / "out", scratch / "work"
    if rank == 0:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
    work.mkdir(parents=True, exist_ok=True)
    function = catalog(spec.function)
    context = StageContext(
        name=spec.name,
        inputs={role: store.local(artifact) for role, artifact in job.inputs.items()},
        parents=job.inputs,
        out=out,
        scratch=work,
        resources=job.resources,
        progress=lambda done, total, metrics: report(spec.name, done, total, metrics),
        fan_out=fan_out,
        root=store.root,
    )
    _use_resources(job)
    forget_peak_memory()
    started = time.perf_counter()
    remote = store.remote_work(spec.name, job.key, work) if spec.runs == "train" else None
    if remote is not None:
        remote.restore(own_may_stay=job.resources.num_workers == 1)
    followed = nullcontext() if remote is None or rank != 0 else remote.followed()
    with stage_log(spec.name), followed:
        facts = _call(spec, function.run, function.config.model_validate(spec.config), context)
    _wait_for_ranks()
    if rank != 0:
        return None
    num_bytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    facts = {**facts, **_measured(job, time.perf_counter() - started), "bytes": num_bytes}
    parents = [artifact.digest for _, artifact in sorted(job.inputs.items())]
    artifact = store.commit(spec.name, job.key, spec.kind, out, parents, facts)
    if (work / EVENTS).is_dir():
        kept = store.scratch_root.parent / ".tensorboard" / f"{spec.name}-{job.key[:12]}"
        shutil.copytree(work / EVENTS, kept, dirs_exist_ok=True)
    shutil.rmtree(scratch, ignore_errors=True)
    if remote is not None:
        remote.forget()
    return artifact


def _call(spec: StageSpec, run: Callable[..., dict[str, Any]], config: Config, context: StageContext) -> dict[str, Any]:
    try:
        facts = run(config, context)
        json.dumps(facts, allow_nan=False)
    except LifecycleError:
        raise
    except Exception as error:
        if _disk_is_full(error):
            raise LifecycleError(
                f"stage {spec.name!r} stopped: the disk under {context.scratch.parent} is full; free some space and run "
                "again, it goes on from what it had done"
            ) from error
        raise LifecycleError(
            f"stage {spec.name!r} failed: {type(error).__name__}: {error}; what it had done is kept in "
            f"{context.scratch.parent}, running again goes on from there"
        ) from error
    return facts


def _disk_is_full(error: Exception) -> bool:
    """Also where safetensors tells the system's error in its words only."""
    if isinstance(error, OSError):
        return error.errno in DISK_FULL
    return any(f"(os error {number})" in str(error) for number in DISK_FULL)


def _use_resources(job: Job) -> None:
    """Training computes with the threads it was given, other stages with all of the run's; all on the run's device."""
    os.environ[DEVICE_VARIABLE] = job.resources.device
    threads = job.resources.threads_per_worker
    if job.spec.runs == "local":
        threads *= job.resources.num_workers
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read when the stage imports torch
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)


def _wait_for_ranks() -> None:
    """No rank may still use the scratch folder when rank 0 commits and removes it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def _measured(job: Job, seconds: float) -> dict[str, Any]:
    spec = job.spec
    return {
        "seconds": round(seconds, 3),
        "peak_memory_bytes": peak_memory(),
        "finished": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "function": spec.function,
        "version": spec.version,
        "config": spec.config,
        "versioned": spec.versioned,
        "inputs": {role: artifact.digest for role, artifact in job.inputs.items()},
        "resources": job.resources.model_dump(mode="json"),
        "provenance": provenance(),
    }

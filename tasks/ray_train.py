"""Ray Train V2 under the training stages: one worker group serves all of a run's jobs, one after the other.

A `TorchTrainer.fit` of its own costs 11-18 s a stage on two cores (controller and worker processes, two torch imports,
polling); a job sent to a group that already runs costs milliseconds. The workers ask a mailbox actor for the next job.
A worker that dies takes its group down; Ray Train starts it again and the mailbox hands out the same job once more,
which goes on from the checkpoints in its scratch folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import traceback
import uuid
from collections.abc import Mapping
from typing import Any

from infra.artifacts import Artifact
from infra.errors import ArtifactCorrupted, ConfigError, DataRefused, GateFailed, LifecycleError
from infra.stages import Resources
from infra.storage import open_store
from tasks.catalog import Catalog
from tasks.stage import Job, Report, perform

log = logging.getLogger(__name__)

TRIES = 2  # executions of one job when its workers die
MAX_RESTARTS = 20  # of the worker group in one run
DIED = (
    f"its worker processes died {TRIES} times, perhaps out of memory; lower batch_size or num_workers, then run again"
)
POLL_SECONDS = 1.0
STOP_SECONDS = 5.0
ERRORS: dict[str, type[LifecycleError]] = {
    cls.__name__: cls for cls in (LifecycleError, ConfigError, DataRefused, GateFailed, ArtifactCorrupted)
}


class Mailbox:
    """Jobs in, outcomes out; the one actor that the driver and every rank of every worker group talk to."""

    def __init__(self) -> None:
        self.jobs: list[str] = []
        self.outcomes: dict[int, dict[str, Any]] = {}
        self.begun: dict[int, set[str]] = {}
        self.complaints: dict[int, dict[str, Any]] = {}
        self.progress: tuple[int, int, int, dict[str, float]] = (-1, 0, 0, {})
        self.closed = False
        self.changed = asyncio.Condition()

    async def put(self, job: str) -> int:
        """Queue a job; returns its number."""
        async with self.changed:
            self.jobs.append(job)
            self.changed.notify_all()
            return len(self.jobs) - 1

    async def take(self, seen: int, group: str) -> tuple[int, str] | None:
        """The first unfinished job after number `seen`, waited for; None when the mailbox is closed."""
        async with self.changed:
            while not self.closed:
                for number in range(seen + 1, len(self.jobs)):
                    if number in self.outcomes:
                        continue
                    begun = self.begun.setdefault(number, set())
                    if group not in begun and len(begun) >= TRIES:
                        self.outcomes[number] = self.complaints.get(
                            number, {"error": "LifecycleError", "message": DIED}
                        )
                        self.changed.notify_all()
                        continue
                    begun.add(group)
                    return number, self.jobs[number]
                await self.changed.wait()
            return None

    async def tell(self, number: int, done: int, total: int, metrics: dict[str, float]) -> bool:
        """Progress of a job; the answer is whether to go on."""
        self.progress = (number, done, total, metrics)
        return not self.closed

    async def finish(self, number: int, outcome: dict[str, Any]) -> None:
        """The first outcome of a job stays."""
        async with self.changed:
            self.outcomes.setdefault(number, outcome)
            self.changed.notify_all()

    async def complain(self, number: int, outcome: dict[str, Any]) -> None:
        """What to report if the next try fails too; the first complaint stays."""
        self.complaints.setdefault(number, outcome)

    async def look(
        self, number: int, seconds: float
    ) -> tuple[dict[str, Any] | None, tuple[int, int, int, dict[str, float]]]:
        """The outcome of a job, waited for at most `seconds`, and the latest progress."""
        async with self.changed:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.changed.wait_for(lambda: number in self.outcomes), seconds)
            return self.outcomes.get(number), self.progress

    async def close(self) -> None:
        """No more jobs; the one that runs is asked to stop at its next progress report."""
        async with self.changed:
            self.closed = True
            self.changed.notify_all()


class _Stopped(BaseException):
    """Raised inside a stage when the run is being stopped."""


def serve_jobs(settings: dict[str, Any]) -> None:
    """The loop of every training worker: take a job, run its stage function, report, until the mailbox closes."""
    import ray
    from ray import train

    mailbox, catalog = settings["mailbox"], settings["catalog"]
    rank, world = train.get_context().get_world_rank(), train.get_context().get_world_size()
    for function in settings["functions"]:
        catalog(function)
    group = ray.util.get_current_placement_group().id.hex()  # the same on all ranks, new after a restart
    seen = -1
    while (taken := ray.get(mailbox.take.remote(seen, group))) is not None:
        seen, text = taken
        outcome = _work(mailbox, seen, Job.model_validate_json(text), catalog, rank)
        if "error" in outcome and world > 1:
            # the other ranks may wait for this one for ever, and an unexpected error may only say that one of them died
            tell = mailbox.complain if outcome["error"] == LifecycleError.__name__ else mailbox.finish
            ray.get(tell.remote(seen, outcome))
            raise RuntimeError(f"job {seen} failed on rank {rank}; the worker group starts again")
        if rank == 0:
            ray.get(mailbox.finish.remote(seen, outcome))


def _work(mailbox: Any, number: int, job: Job, catalog: Catalog, rank: int) -> dict[str, Any]:
    """One job on this rank, and what became of it."""
    import ray

    def report(stage: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        if not ray.get(mailbox.tell.remote(number, done, total, dict(metrics))):
            raise _Stopped

    try:
        artifact = perform(job, open_store(job.root), catalog, report, rank=rank)
    except _Stopped:
        return {"error": "LifecycleError", "message": f"stage {job.spec.name!r} was stopped"}
    except Exception as error:
        kind = type(error).__name__ if isinstance(error, LifecycleError) else "LifecycleError"
        message = str(error) if isinstance(error, LifecycleError) else f"{type(error).__name__}: {error}"
        return {"error": kind, "message": message, "trace": traceback.format_exc()}
    return {} if artifact is None else {"artifact": artifact.model_dump(mode="json")}


class TrainingGroup:
    """The driver's end: starts the worker group in a thread when the first job comes, feeds it, shuts it down."""

    def __init__(self, resources: Resources, catalog: Catalog, storage: str, functions: tuple[str, ...] = ()) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self.resources, self.catalog, self.storage = resources, catalog, storage
        self.functions = functions  # imported by the workers before their first job
        self.use_gpu = uses_gpu(resources)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.mailbox = ray.remote(num_cpus=0, scheduling_strategy=here)(
            Mailbox
        ).remote()  # no other node's loss ends it
        self.failure: Exception | None = None
        self.thread = threading.Thread(target=self._fit, name="training-group", daemon=True)
        self.thread.start()

    def run(self, job: Job, report: Report) -> Artifact:
        """Send one job to the group and wait for its artifact."""
        import ray

        if not self.use_gpu:  # a worker sees GPUs it did not ask for
            job = job.model_copy(update={"resources": job.resources.model_copy(update={"device": "cpu"})})
        number = ray.get(self.mailbox.put.remote(job.model_dump_json()))
        told = 0
        while True:
            outcome, progress = ray.get(self.mailbox.look.remote(number, POLL_SECONDS))
            if progress[0] == number and progress[1] != told:
                told = progress[1]
                report(job.spec.name, *progress[1:])
            if outcome is not None:
                return _artifact(job, outcome)
            if not self.thread.is_alive():
                raise LifecycleError(
                    f"stage {job.spec.name!r} failed: the Ray Train worker group ended: {self.failure}; "
                    "run again to go on from its last checkpoint, or with launcher=inprocess to leave Ray out"
                )

    def close(self) -> None:
        """Ask a running job to stop at its next report and let the workers go; gives up waiting after a while."""
        import ray

        try:
            ray.get(self.mailbox.close.remote(), timeout=STOP_SECONDS)
            self.thread.join(STOP_SECONDS)
        except ray.exceptions.RayError as error:
            log.warning("training workers did not stop in time: %s", error)

    def _fit(self) -> None:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        per_worker = {"CPU": 1.0, "GPU": 1.0} if self.use_gpu else {"CPU": 1.0}
        trainer = TorchTrainer(
            serve_jobs,
            train_loop_config={"mailbox": self.mailbox, "catalog": self.catalog, "functions": self.functions},
            scaling_config=ScalingConfig(
                num_workers=self.resources.num_workers, use_gpu=self.use_gpu, resources_per_worker=per_worker
            ),
            run_config=RunConfig(
                name=f"t2i-{uuid.uuid4().hex[:12]}",
                storage_path=self.storage,
                failure_config=FailureConfig(max_failures=MAX_RESTARTS),
            ),
        )
        try:
            trainer.fit()
        except Exception as error:
            self.failure = error
            log.debug("worker group ended", exc_info=True)


def _artifact(job: Job, outcome: dict[str, Any]) -> Artifact:
    if "error" not in outcome:
        return Artifact.model_validate(outcome["artifact"])
    if outcome["message"] == DIED:
        raise LifecycleError(f"stage {job.spec.name!r} failed: {DIED}")
    log.debug("%s", outcome.get("trace", ""))
    raise ERRORS.get(outcome["error"], LifecycleError)(outcome["message"])


def uses_gpu(resources: Resources) -> bool:
    """Whether workers ask for a GPU each: as told, or, with `auto`, when the Ray cluster has one for every worker."""
    if resources.device == "cpu":
        return False
    import ray

    found, wanted = int(ray.cluster_resources().get("GPU", 0)), resources.num_workers
    if found < wanted and resources.device == "cuda":
        raise ConfigError(
            f"num_workers={wanted} need a GPU each, but Ray has {found}; set run.resources.num_workers to at most {found}, "
            "or device to cpu"
        )
    if 0 < found < wanted:
        log.warning(
            "num_workers=%d but %d GPUs: training on the CPU; set num_workers to at most %d", wanted, found, found
        )
    return found >= wanted

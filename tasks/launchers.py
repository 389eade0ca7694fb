"""Where a stage runs: in this process, on workers of a local or given Ray, or as a job of the Ray Jobs API."""

from __future__ import annotations

import base64
import json
import logging
import os
import shutil
import tempfile
import threading
import time
import uuid
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infra.artifacts import Artifact
from infra.errors import LifecycleError
from infra.stages import FanOut, Resources, fan_out_here
from infra.storage import open_store
from tasks.catalog import Catalog, stage_function
from tasks.ray_session import RaySession
from tasks.ray_train import ERRORS, TrainingGroup
from tasks.stage import Job, Launcher, Report, perform

log = logging.getLogger(__name__)

JOB_POLL_SECONDS = 1.0
STOP_SECONDS = 20.0
ALIVE = ("PENDING", "RUNNING")
JOB_VARIABLE = "T2I_JOB"
MAX_VARIABLE = 120_000
HANDED_ON = ("AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "PYTHONPATH")  # to a job; keys and tokens are the cluster's own
ERROR_MARK = "T2I-ERROR "
PROGRESS_MARK = "T2I-PROGRESS "


def launcher_for(resources: Resources, catalog: Catalog = stage_function) -> Launcher:
    """The launcher a run asked for."""
    if resources.launcher == "rayjob":
        return RayJobLauncher(resources)
    return LocalLauncher(resources, catalog)


class LocalLauncher:
    """Local stages in this process; training stages here too, or on Ray Train workers. Ray starts when first needed."""

    def __init__(self, resources: Resources, catalog: Catalog = stage_function) -> None:
        self.resources, self.catalog = resources, catalog
        self.session: RaySession | None = None
        self.group: TrainingGroup | None = None
        self.warming: threading.Thread | None = None
        self.storage = Path(tempfile.gettempdir()) / f"t2i-train-{uuid.uuid4().hex[:12]}"

    def warm_up(self, functions: Sequence[str]) -> None:
        """Start Ray and the training workers in the background; they import what `functions` need meanwhile."""
        if self.resources.launcher != "ray" or self.session is not None:
            return
        self.session = RaySession(self.resources)
        if functions and self.resources.ray_address is None:  # somebody else's cluster is not held while idle
            self.warming = threading.Thread(target=self._warm, args=(tuple(functions),), daemon=True)
            self.warming.start()

    def run(self, job: Job, report: Report) -> Artifact:
        """Run one job to its artifact."""
        if job.spec.runs == "train" and self.resources.launcher == "ray":
            return self._training_group().run(job, report)
        artifact = perform(job, open_store(job.root), self.catalog, report, self._fan_out())
        assert artifact is not None  # rank 0
        return artifact

    def close(self) -> None:
        """Stop what runs and the Ray that was started here."""
        if self.warming is not None:
            self.warming.join()
        group, session, self.group, self.session, self.warming = self.group, self.session, None, None, None
        if group is not None:
            group.close()
        if session is not None:
            session.close()
        shutil.rmtree(self.storage, ignore_errors=True)

    def _warm(self, functions: tuple[str, ...]) -> None:
        try:
            self._connected()
            self.group = TrainingGroup(self.resources, self.catalog, str(self.storage), functions)
        except Exception:  # the first training job meets it again and reports it
            log.debug("training workers could not be started ahead", exc_info=True)

    def _training_group(self) -> TrainingGroup:
        if self.warming is not None:
            self.warming.join()
        if self.group is None or not self.group.thread.is_alive():
            self._connected()
            self.group = TrainingGroup(self.resources, self.catalog, str(self.storage))
        return self.group

    def _fan_out(self) -> FanOut:
        return self._ray_fan_out if self.resources.launcher == "ray" else fan_out_here

    def _ray_fan_out(self, function: Any, items: Any, /) -> Any:
        from tasks.ray_data import ray_fan_out

        self._connected()
        return ray_fan_out(function, items, os.cpu_count() or 1)

    def _connected(self) -> None:
        if self.session is None:
            self.session = RaySession(self.resources)
        self.session.wait()


class RayJobLauncher:
    """Every stage is a job of a Ray cluster; a lost driver finds it again by its name and goes on waiting."""

    def __init__(self, resources: Resources) -> None:
        from ray.job_submission import JobSubmissionClient

        self.resources = resources
        self.client = JobSubmissionClient(resources.ray_address or "http://127.0.0.1:8265")
        self.running: str | None = None

    def run(self, job: Job, report: Report) -> Artifact:
        """Submit or find the job, wait for it, and read the artifact from the store."""
        self.running = self._submit(job)
        state = self._wait(self.running, job, report)
        submission, self.running = self.running, None
        found = open_store(job.root).find(job.spec.name, job.key)
        if state == "SUCCEEDED" and found is not None:
            return found
        raise self._error(job, submission, state)

    def close(self) -> None:
        """Stop the job that is being waited for."""
        submission, self.running = self.running, None
        if submission is not None and self._state(submission) in ALIVE:
            self.client.stop_job(submission)
            deadline = time.monotonic() + STOP_SECONDS
            while self._state(submission) in ALIVE and time.monotonic() < deadline:
                time.sleep(JOB_POLL_SECONDS / 4)

    def _submit(self, job: Job) -> str:
        attempt = 0
        while True:
            submission = f"{job.spec.name}-{job.key[:16]}-{attempt}"
            match self._state(submission):
                case None:
                    return self._start(submission, job)
                case state if state in ALIVE:
                    log.info("job %s runs already; waiting for it", submission)
                    return submission
                case _:
                    attempt += 1

    def _start(self, submission: str, job: Job) -> str:
        # no working_dir: two Ray nodes on one machine share it, and the second one to unpack it removes it under the first
        variables = {"RAY_TRAIN_V2_ENABLED": "1", JOB_VARIABLE: packed(job), **handed_on()}
        try:
            started: str = self.client.submit_job(
                entrypoint="python -m tasks.worker",
                submission_id=submission,
                runtime_env={"env_vars": variables},
                metadata={"stage": job.spec.name, "key": job.key, "root": job.root},
                entrypoint_num_cpus=0,  # it only waits; the workers it starts ask for what they need
            )
        except RuntimeError:
            if self._state(submission) is None:
                raise
            return submission  # another driver submitted it in the meantime
        return started

    def _state(self, submission: str) -> str | None:
        try:
            return str(self.client.get_job_status(submission).value)
        except RuntimeError as error:
            if "404" in str(error) or "does not exist" in str(error):
                return None
            raise

    def _wait(self, submission: str, job: Job, report: Report) -> str:
        while True:
            state = self._state(submission)
            if state not in ALIVE:
                return state or "LOST"
            progress = self.client.get_job_logs(submission).rpartition(PROGRESS_MARK)[2].partition("\n")[0]
            if progress.startswith("["):
                done, total, metrics = json.loads(progress)
                report(job.spec.name, done, total, metrics)
            time.sleep(JOB_POLL_SECONDS)

    def _error(self, job: Job, submission: str, state: str) -> LifecycleError:
        text = self.client.get_job_logs(submission) if state != "LOST" else ""
        line = text.rpartition(ERROR_MARK)[2].partition("\n")[0]
        if line.startswith("{"):
            problem = json.loads(line)
            return ERRORS.get(problem["error"], LifecycleError)(problem["message"])
        last = text.strip().splitlines()[-1:] or ["no log"]
        return LifecycleError(
            f"stage {job.spec.name!r} failed: Ray job {submission} ended as {state}: {last[0]}; "
            f"`ray job logs {submission}` has the rest"
        )


def packed(job: Job) -> str:
    """A job as the value of an environment variable; Linux takes up to 128 KiB, which is some MB of a job's JSON."""
    text = base64.b85encode(zlib.compress(job.model_dump_json().encode(), 9)).decode()
    if len(text) > MAX_VARIABLE:
        raise LifecycleError(
            f"stage {job.spec.name!r} has a job of {len(text)} bytes, more than the {MAX_VARIABLE} that a Ray job takes; "
            "give it fewer inputs, or run it with launcher=ray"
        )
    return text


def unpacked(text: str) -> Job:
    """The job that `packed` made the text of."""
    return Job.model_validate_json(zlib.decompress(base64.b85decode(text)))


def handed_on() -> dict[str, str]:
    """Variables of this process that a job needs too, none of them secret."""
    return {name: os.environ[name] for name in HANDED_ON if name in os.environ}

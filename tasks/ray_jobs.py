"""Stages as jobs of a Ray cluster through its Jobs API; a job is named after its stage's key, so that it is found again."""

from __future__ import annotations

import base64
import json
import logging
import os
import re
import time
import zlib

from infra.artifacts import Artifact
from infra.config import digest_of
from infra.errors import LifecycleError
from infra.stages import Resources
from infra.storage import open_store
from tasks.ray_train import ERRORS
from tasks.stage import Job, Report

log = logging.getLogger(__name__)

JOB_POLL_SECONDS = 1.0
STOP_SECONDS = 20.0
UNREACHABLE_SECONDS = 120.0
RESTARTS = 3  # of a job whose process was lost
LOOK_PAUSE = 20.0  # times as long as reading a job's log took, before it is read again
ALIVE = ("PENDING", "RUNNING")
JOB_VARIABLE = "T2I_JOB"
MAX_VARIABLE = 120_000
HANDED_ON = ("AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "PYTHONPATH")  # to a job; keys and tokens are the cluster's own
ERROR_MARK = "T2I-ERROR "
PROGRESS_MARK = "T2I-PROGRESS "
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_LEVEL = re.compile(r"\S+ \S+ (WARNING|ERROR|CRITICAL) ")


class RayJobLauncher:
    """Every stage is a job of a Ray cluster; a lost driver finds it again by its name and goes on waiting."""

    def __init__(self, resources: Resources) -> None:
        from ray.job_submission import JobSubmissionClient

        self.resources = resources
        self.address = resources.ray_address or "http://127.0.0.1:8265"
        self.client = JobSubmissionClient(self.address)
        self.running: str | None = None
        self.read = 0  # characters of the running job's log that were passed on

    def run(self, job: Job, report: Report) -> Artifact:
        """Submit or find the job, wait for it, and read the artifact from the store; a lost job goes on in a new one."""
        for left in reversed(range(RESTARTS + 1)):
            self.running, self.read = self._submit(job), 0
            state = self._wait(self.running, job, report)
            self._forward(self.running, job, report)
            submission, self.running = self.running, None
            found = open_store(job.root).find(job.spec.name, job.key)
            if found is not None:
                return found
            text = self._log_of(submission)
            if state == "STOPPED" or ERROR_MARK in text or not left:
                break
            log.warning("job %s was lost (%s); it goes on from its last checkpoint in a new job", submission, state)
        raise _error(job, submission, state, text)

    def close(self) -> None:
        """Stop the job that is being waited for."""
        submission, self.running = self.running, None
        try:
            if submission is None or self._state(submission) not in ALIVE:
                return
            self.client.stop_job(submission)
            deadline = time.monotonic() + STOP_SECONDS
            while self._state(submission) in ALIVE and time.monotonic() < deadline:
                time.sleep(JOB_POLL_SECONDS / 4)
        except OSError as error:
            log.warning(
                "job %s may still run, Ray does not answer: %s; `ray job stop %s`", submission, error, submission
            )

    def _submit(self, job: Job) -> str:
        attempt, place = 0, digest_of(job.root)[:8]
        while True:
            submission = f"{job.spec.name}-{job.key[:16]}-{place}-{attempt}"
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
                runtime_env={"env_vars": variables} | ({"image_uri": image} if (image := job.resources.image) else {}),
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
            if "status code 5" in str(error):
                raise ConnectionError(f"Ray at {self.address} is in trouble: {error}") from error
            raise

    def _wait(self, submission: str, job: Job, report: Report) -> str:
        asked, next_look = time.monotonic(), 0.0
        while True:
            try:
                state = self._state(submission)
            except OSError as error:  # a head that restarts or a network that stutters
                if time.monotonic() - asked > UNREACHABLE_SECONDS:
                    self.running = None  # not ours to stop: the next run waits for it
                    raise LifecycleError(
                        f"stage {job.spec.name!r}: Ray at {self.address} has not answered for "
                        f"{UNREACHABLE_SECONDS:.0f} s ({type(error).__name__}); its job {submission} may go on: "
                        "run again when Ray is back to wait for it"
                    ) from error
                time.sleep(JOB_POLL_SECONDS)
                continue
            if state not in ALIVE:
                return state or "LOST"
            asked = time.monotonic()
            if asked >= next_look:
                self._forward(submission, job, report)
                next_look = time.monotonic() + LOOK_PAUSE * (time.monotonic() - asked)  # a long log is read less often
            time.sleep(JOB_POLL_SECONDS)

    def _forward(self, submission: str, job: Job, report: Report) -> None:
        """Pass on what the job's log has that is new: its lines, and of its progress the newest."""
        text, progress = self._log_of(submission), ""
        end = text.rfind("\n") + 1  # the last line may be cut off
        for line in text[self.read : end].splitlines():
            if line.startswith(PROGRESS_MARK):
                progress = line.removeprefix(PROGRESS_MARK)
            elif line and not line.startswith(ERROR_MARK):
                level = _LEVEL.match(line)
                log.log(logging.getLevelNamesMapping()[level[1]] if level else logging.INFO, "%s", line)
        self.read = max(self.read, end)
        if progress:
            done, total, metrics = json.loads(progress)
            report(job.spec.name, done, total, metrics)

    def _log_of(self, submission: str) -> str:
        try:
            return str(self.client.get_job_logs(submission))
        except (OSError, RuntimeError) as error:  # the job is what counts
            log.debug("no log of job %s: %s", submission, error)
            return ""


def _error(job: Job, submission: str, state: str, text: str) -> LifecycleError:
    """What the job's log says went wrong."""
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
    packed_bytes = zlib.compress(job.model_dump_json().encode(), 9)
    text = base64.b64encode(packed_bytes).decode()  # not base85: Ray puts variables in the place of its dollars
    if len(text) > MAX_VARIABLE:
        raise LifecycleError(
            f"stage {job.spec.name!r} has a job of {len(text)} bytes, more than the {MAX_VARIABLE} that a Ray job takes; "
            "give it fewer inputs, or run it with launcher=ray"
        )
    return text


def unpacked(text: str) -> Job:
    """The job that `packed` made the text of."""
    return Job.model_validate_json(zlib.decompress(base64.b64decode(text)))


def handed_on() -> dict[str, str]:
    """Variables of this process that a job needs too, none of them secret."""
    return {name: os.environ[name] for name in HANDED_ON if name in os.environ}

"""`T2I_JOB=... python -m tasks.worker`: the entry point of a Ray job; runs one stage and commits its artifact."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Mapping

from ray.util.metrics import Gauge

from infra.errors import LifecycleError
from tasks.launchers import LocalLauncher
from tasks.ray_jobs import ERROR_MARK, JOB_VARIABLE, LOG_FORMAT, PROGRESS_MARK, unpacked

PROGRESS_SECONDS = 2.0


class JobProgress:
    """Progress as lines of the job's log, which is all the driver can read, and among the metrics Ray exports."""

    def __init__(self) -> None:
        self.next = 0.0
        self.share = Gauge("t2i_stage_progress", "Share of the stage's work that is done", tag_keys=("stage",))
        self.metric = Gauge("t2i_stage_metric", "Newest training metrics", tag_keys=("stage", "metric"))

    def __call__(self, stage: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """Tell how far it is, at most every two seconds and at the end."""
        if time.monotonic() < self.next and done < total:
            return
        self.next = time.monotonic() + PROGRESS_SECONDS
        sys.stdout.write(f"{PROGRESS_MARK}{json.dumps([done, total, dict(metrics)])}\n")
        sys.stdout.flush()
        self.share.set(done / max(total, 1), {"stage": stage})
        for name, value in metrics.items():
            self.metric.set(value, {"stage": stage, "metric": name})


def main() -> int:
    """Run the job that the environment holds; the exit code is the error's."""
    job = unpacked(os.environ[JOB_VARIABLE])
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    resources = job.resources.model_copy(update={"launcher": "ray", "ray_address": "auto"})
    launcher = LocalLauncher(resources)
    try:
        launcher.run(job.model_copy(update={"resources": resources}), JobProgress())
    except LifecycleError as error:
        logging.getLogger(__name__).exception("stage %s failed", job.spec.name)
        problem = {"error": type(error).__name__, "message": str(error)}
        sys.stdout.write(f"{ERROR_MARK}{json.dumps(problem)}\n")
        return error.exit_code
    finally:
        launcher.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())

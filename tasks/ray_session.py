"""A Ray for the length of a run: a local one on its own thread, or a connection to one that is there."""

from __future__ import annotations

import logging
import os
import threading

from infra.errors import ConfigError, LifecycleError
from infra.stages import Resources

log = logging.getLogger(__name__)

START_SECONDS = 300.0
OBJECT_STORE_BYTES = 200_000_000
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # the default of 2 s makes every start and end slower
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


class RaySession:
    """Ray's processes die with the thread that started them, so one thread starts Ray and stays until `close`."""

    def __init__(self, resources: Resources) -> None:
        self.resources = resources
        self.ready, self.leave = threading.Event(), threading.Event()
        self.failure: Exception | None = None
        self.thread = threading.Thread(target=self._hold, name="ray-session", daemon=True)
        self.thread.start()

    def wait(self) -> None:
        """Return when Ray is there."""
        if not self.ready.wait(START_SECONDS):
            raise LifecycleError(f"Ray did not start within {START_SECONDS:.0f} s; try again, or launcher=inprocess")
        if self.failure is not None:
            where = self.resources.ray_address
            hint = f"is a Ray running at {where}?" if where else "try again, or launcher=inprocess"
            raise ConfigError(f"Ray did not start: {self.failure}; {hint}") from self.failure

    def close(self) -> None:
        """Disconnect; a local Ray ends."""
        self.leave.set()
        self.thread.join()

    def _hold(self) -> None:
        try:
            self._start()
        except Exception as error:
            self.failure = error
        finally:
            self.ready.set()
        self.leave.wait()
        import ray

        ray.shutdown()

    def _start(self) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import ray

        if self.resources.ray_address:
            ray.init(address=self.resources.ray_address, log_to_driver=False, logging_level=logging.ERROR)
            return
        os.environ.pop("RAY_ADDRESS", None)
        cpus = os.cpu_count() or 1
        ray.init(
            num_cpus=cpus + self.resources.num_workers,  # idle training workers must not starve fanned-out tasks
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=OBJECT_STORE_BYTES,
        )

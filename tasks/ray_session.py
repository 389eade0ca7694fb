"""A Ray for the length of a run: a local one on its own thread, or a connection to one that is there."""

from __future__ import annotations

import logging
import threading

from infra.embedded import local_ray
from infra.errors import ConfigError, LifecycleError
from infra.stages import Resources

log = logging.getLogger(__name__)

START_SECONDS = 300.0


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
            with local_ray(self.resources):
                self.ready.set()
                self.leave.wait()
        except Exception as error:
            self.failure = error
            self.ready.set()

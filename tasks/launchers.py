"""Where a stage runs: in this process, on workers of a local or given Ray, or as a job of the Ray Jobs API."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infra.artifacts import Artifact
from infra.stages import FanOut, Resources, fan_out_here
from infra.storage import open_store
from tasks.catalog import Catalog, stage_function
from tasks.ray_jobs import RayJobLauncher
from tasks.ray_session import RaySession
from tasks.ray_train import TrainingGroup
from tasks.stage import Job, Launcher, Report, perform

log = logging.getLogger(__name__)


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
        import ray

        from tasks.ray_data import ray_fan_out

        self._connected()
        given = self.resources.ray_address is not None  # a local Ray counts more CPUs than there are, for the trainers
        num_cpus = int(ray.cluster_resources().get("CPU", 1)) if given else os.cpu_count()
        return ray_fan_out(function, items, max(1, num_cpus or 1))

    def _connected(self) -> None:
        if self.session is None:
            self.session = RaySession(self.resources)
        self.session.wait()

"""A stage as a Prefect task: named like the stage, its small JSON result persisted under the stage's content key."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from typing import Any

from prefect import Task
from prefect.cache_policies import CacheKeyFnPolicy
from prefect.context import TaskRunContext
from prefect.logging.handlers import APILogHandler
from prefect.runtime import flow_run

from flows.run import Run
from infra.config import digest_of
from infra.logging import ShortLines, also
from infra.stages import StageSpec

Record = dict[str, Any]
GPU_TAG = "t2i-gpu"  # of training stages: the server lets so many run at once as its limit of this name says


class PrefectLines(APILogHandler):
    """What a run logs, from all threads and with secrets masked, in its flow run; under a stage's task what the stage logs."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(ShortLines(tracebacks=True))
        self.flow_run_id = flow_run.id

    def emit(self, record: logging.LogRecord) -> None:
        """Queue one line; Prefect sends them in the background."""
        task, record = TaskRunContext.get(), copy.copy(record)
        vars(record).update(flow_run_id=self.flow_run_id, task_run_id=None if task is None else task.task_run.id)
        super().emit(record)


class PrefectCall:
    """Calls stage bodies as tasks of the flow run at work; the store stays the truth, so a missing artifact runs again."""

    def __init__(self, root: str) -> None:
        self.place = digest_of(root)[:8]  # Prefect's results may serve several roots

    def execute(self, run: Run) -> Record:
        """Execute a run of the flow run at work, and log into it."""
        with also(PrefectLines()):
            return run.execute(self)

    def __call__(
        self, spec: StageSpec, key: str, fresh: bool, inputs: Mapping[str, Any], body: Callable[[], Record], /
    ) -> Record:
        """Run `body` as a task; `inputs` are earlier results and draw the edges of the graph."""
        cache_key = f"{spec.name}-{key}-{self.place}"

        def run_stage(inputs: dict[str, Any]) -> Record:
            return body()

        task = Task(
            fn=run_stage,
            name=spec.name,
            task_run_name=spec.name,
            description=f"stage function {spec.function}",
            tags=[GPU_TAG] if spec.runs == "train" else [],
            persist_result=True,
            result_serializer="json",
            cache_policy=CacheKeyFnPolicy(cache_key_fn=lambda _context, _parameters: cache_key),
            refresh_cache=fresh,
        )
        result: Record = task(dict(inputs))
        return result


def flow_run_id(name: str) -> str:
    """The run's name in the store: the same when Prefect runs the flow run again."""
    return f"{name}-{str(flow_run.id)[:8]}"

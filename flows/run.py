"""One run over a list of stages: decide, run or reuse, write down what happened. Prefect comes in as the `call`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

from flows.config import RunConfig
from flows.plan import PlanRow, decide, history, refuse_unknown
from flows.summary import summarise
from infra.artifacts import Artifact
from infra.disk import require_disk
from infra.errors import GateFailed, LifecycleError
from infra.logging import run_log
from infra.stages import StageSpec
from infra.storage import Store, open_store
from tasks.catalog import Catalog, stage_function
from tasks.launchers import LocalLauncher, launcher_for
from tasks.promote import missed_gates
from tasks.stage import inputs_of, materialise

log = logging.getLogger(__name__)

PROGRESS_SECONDS = 5.0
GIVEN_AWAY = {"evaluate", "export", "report"}
Record = dict[str, Any]


class Display(Protocol):
    """Where a run tells a person how far it is."""

    def stage(self, number: int, total: int, row: PlanRow) -> None: ...
    def progress(self, stage: str, done: int, total: int, metrics: Mapping[str, float]) -> None: ...
    def done(self, entry: Mapping[str, Any]) -> None: ...


class LogDisplay:
    """A line of the log per stage."""

    def stage(self, number: int, total: int, row: PlanRow) -> None:
        """A stage begins."""
        log.info("stage %d/%d %s: %s (%s)", number, total, row.stage, row.state, row.reason)

    def progress(self, stage: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """A stage has got further."""
        log.debug("stage %s: %d of %d %s", stage, done, total, dict(metrics))

    def done(self, entry: Mapping[str, Any]) -> None:
        """A stage has ended."""
        log.info("stage %s %s in %.1f s", entry["name"], entry["status"], entry["seconds"])


class Call(Protocol):
    """How the body of a stage is called: `inputs` are what it depends on, `fresh` means no remembered result will do."""

    def __call__(
        self, spec: StageSpec, key: str, fresh: bool, inputs: Mapping[str, Any], body: Callable[[], Record], /
    ) -> Record: ...


def call_here(
    spec: StageSpec, key: str, fresh: bool, inputs: Mapping[str, Any], body: Callable[[], Record], /
) -> Record:
    """The call without Prefect."""
    return body()


class Run:
    """The stages of one run, its record, and the launcher it holds."""

    def __init__(
        self,
        run_id: str,
        specs: Sequence[StageSpec],
        config: RunConfig,
        about: Record,
        force: Sequence[str] = (),
        catalog: Catalog = stage_function,
        display: Display | None = None,
        given: Mapping[str, Artifact] | None = None,
        only: str | None = None,
    ) -> None:
        refuse_unknown(specs, [*force, *([only] if only else [])])
        self.run_id, self.specs, self.config, self.force, self.only = run_id, list(specs), config, set(force), only
        self.display: Display = display or LogDisplay()
        self.launcher = launcher_for(config.resources, catalog)
        self.artifacts: dict[str, Artifact] = dict(given or {})
        self.record: Record = {"run": run_id, **about}
        self.entries: dict[str, Record] = {}
        self.started = time.monotonic()
        self.saved = 0.0

    def execute(self, call: Call = call_here) -> Record:
        """Bring every stage to its artifact, in order; returns the record. One run at a time on a root."""
        store = open_store(self.config.root)
        require_disk(self.config.root, int(self.config.min_free_gb * 1e9))
        with store.lock(), self._log(store):
            self._forget_done(store)
            past = history(store)
            try:
                self._save(store, "running")
                for number, spec in enumerate(self.specs, 1):
                    row = decide(spec, store, self.artifacts, past, spec.name in self.force)
                    self.display.stage(number, len(self.specs), row)
                    self._stage(spec, row, store, call)
                self._pass_gates()
                for name in GIVEN_AWAY & self.artifacts.keys():
                    store.local(self.artifacts[name])  # refuses a corrupted one
            except BaseException as error:
                self._save(store, _outcome(error), error)
                raise
            finally:
                self.launcher.close()
            self._save(store, "ok")
        return self.record

    def _log(self, store: Store) -> AbstractContextManager[object]:
        """Beside the run's record, when the root is a folder."""
        return nullcontext() if "://" in store.root else run_log(Path(store.root) / "runs" / f"{self.run_id}.jsonl")

    def _stage(self, spec: StageSpec, row: PlanRow, store: Store, call: Call) -> None:
        if self.only not in (None, spec.name):
            if row.artifact is not None:
                self._remember(spec, "reused", 0.0, row.artifact)
            return
        inputs_of(spec, self.artifacts)
        assert row.key is not None  # every stage before has its artifact
        started = time.monotonic()
        fresh = row.state != "HIT"
        if fresh and isinstance(self.launcher, LocalLauncher):
            self.launcher.warm_up(self._trained_later(spec))
        self.entries[spec.name] = {"name": spec.name, "key": row.key, "status": "running", "seconds": 0.0}
        if fresh:
            self._save(store, "running")

        def body() -> Record:
            artifact, _ = materialise(
                spec, store, self.artifacts, self.config.resources_of(spec.name), self.launcher,
                force=spec.name in self.force or row.damaged, report=lambda *told: self._progress(store, *told),
            )  # fmt: skip
            return artifact.model_dump(mode="json")

        inputs = {role: self.entries.get(stage, {}).get("result") for role, stage in spec.inputs.items()}
        result = call(spec, row.key, fresh, inputs, body)
        artifact = store.find(spec.name, row.key)
        if artifact is None:
            raise LifecycleError(f"stage {spec.name!r} ended without an artifact in {store.root}; run it again")
        self._remember(
            spec, "ran" if fresh else "reused", time.monotonic() - started if fresh else 0.0, artifact, result
        )

    def _remember(
        self, spec: StageSpec, status: str, seconds: float, artifact: Artifact, result: Record | None = None
    ) -> None:
        self.artifacts[spec.name] = artifact
        key = artifact.uri.rstrip("/").split("/")[-1]
        entry = {
            "name": spec.name, "key": self.entries.get(spec.name, {}).get("key", key), "status": status,
            "seconds": round(seconds, 3), "uri": artifact.uri, "digest": artifact.digest,
        }  # fmt: skip
        self.entries[spec.name] = {**entry, "result": result}
        self.display.done(entry)

    def _trained_later(self, spec: StageSpec) -> list[str]:
        """Functions of the training stages from here on."""
        later = self.specs[self.specs.index(spec) :] if self.only is None else [spec]
        return sorted({each.function for each in later if each.runs == "train"})

    def _pass_gates(self) -> None:
        missed = [text for artifact in self.artifacts.values() for text in missed_gates(artifact.facts)]
        if missed:
            raise GateFailed(f"{len(missed)} gate(s) missed: {'; '.join(missed)}; see the report")

    def _forget_done(self, store: Store) -> None:
        """A retried run does not force again what it forced before."""
        known = {str(run["run"]): run for run in store.list_runs()}.get(self.run_id, {})
        self.force -= {entry["name"] for entry in known.get("stages", []) if entry["status"] == "ran"}

    def _progress(self, store: Store, stage: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        self.display.progress(stage, done, total, metrics)
        if time.monotonic() - self.saved > PROGRESS_SECONDS:
            self.record["progress"] = {"stage": stage, "done": done, "total": total}
            self._save(store, "running")

    def _save(self, store: Store, outcome: str, error: BaseException | None = None) -> None:
        self.saved = time.monotonic()
        stages = [_public(self.entries.get(spec.name), spec.name, outcome) for spec in self.specs]
        self.record |= {
            "root": store.root, "outcome": outcome, "stages": stages,
            "wall_seconds": round(time.monotonic() - self.started, 3), "error": None if error is None else str(error),
        }  # fmt: skip
        if outcome != "running":
            self.record.pop("progress", None)
            self.record |= summarise(store, self.artifacts)
        store.write_run(self.run_id, self.record)


def _public(entry: Record | None, name: str, outcome: str) -> Record:
    if entry is None:
        status = "waiting" if outcome == "running" else "skipped"
        return {"name": name, "key": None, "status": status, "seconds": 0.0, "uri": None, "digest": None}
    shown = {"uri": None, "digest": None} | {key: value for key, value in entry.items() if key != "result"}
    if shown["status"] == "running" and outcome != "running":
        shown["status"] = "failed" if outcome in ("stage_failed", "gate_failed") else "interrupted"
    return shown


def _outcome(error: BaseException) -> str:
    match error:
        case GateFailed():
            return "gate_failed"
        case Exception():
            return "stage_failed"
        case _:
            return "interrupted"

"""What Prefect's UI shows of a run beside its graph: progress while it trains, then a table, a picture and the report."""

from __future__ import annotations

import base64
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.artifacts import (
    create_image_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from flows.display import current_display
from flows.plan import PlanRow
from infra.artifacts import Artifact
from infra.errors import LifecycleError
from infra.storage import open_store

log = logging.getLogger(__name__)

EVERY_SECONDS = 5.0
LARGEST_PICTURE = 1_000_000  # bytes; it travels inside the artifact, no server has to serve it


class PrefectDisplay:
    """The chosen display, and beside it one progress artifact per stage that reports progress."""

    def __init__(self) -> None:
        self.inner = current_display()
        self.bar: UUID | None = None
        self.next = 0.0

    def stage(self, number: int, total: int, row: PlanRow) -> None:
        """A stage begins."""
        self.bar = None
        self.inner.stage(number, total, row)

    def progress(self, stage: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """A stage has got further; Prefect hears of it every few seconds and at the end."""
        self.inner.progress(stage, done, total, metrics)
        if time.monotonic() < self.next and done < total:
            return
        self.next = time.monotonic() + EVERY_SECONDS
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if name != "seconds")
        share, text = 100.0 * done / max(total, 1), f"{done} of {total}" + (f": {numbers}" if numbers else "")
        if self.bar is None:
            made: Any = create_progress_artifact(progress=share, key=f"progress-{stage}", description=text)
            self.bar = made
        else:
            update_progress_artifact(artifact_id=self.bar, progress=share, description=text)

    def done(self, entry: Mapping[str, Any]) -> None:
        """A stage has ended."""
        self.inner.done(entry)


def show(record: dict[str, Any]) -> dict[str, Any]:
    """Leave the run's table, newest picture grid and report as artifacts of the flow run; returns the record as it is."""
    store = open_store(record["root"], create=False)
    found = {entry["name"]: store.find(entry["name"], entry["key"]) for entry in record["stages"] if entry["digest"]}
    create_table_artifact(
        key="stages", table=[_row(entry, found.get(entry["name"])) for entry in record["stages"]],
        description=f"run {record['run']} under {record['root']}: {record['outcome']}",
    )  # fmt: skip
    for name, artifact in reversed(found.items()):
        if artifact is not None and artifact.kind == "checkpoint":
            try:
                grids = sorted((store.local(artifact) / "grids").glob("*.png"))
            except LifecycleError as error:
                log.warning("no picture of %s is shown: %s", name, error)
                break
            if grids and grids[-1].stat().st_size <= LARGEST_PICTURE:
                _picture(name, grids[-1])
                break
    if record.get("report"):
        create_markdown_artifact(key="report", markdown=f"The report: `{record['report']}`\n\n{_scores(record)}",
                                 description="One page with everything; open the file in a browser")  # fmt: skip
    return record


def _picture(stage: str, path: Path) -> None:
    data = base64.b64encode(path.read_bytes()).decode()
    create_image_artifact(image_url=f"data:image/png;base64,{data}", key="samples",
                          description=f"{stage} draws its fixed prompts ({path.stem})")  # fmt: skip


def _row(entry: Mapping[str, Any], artifact: Artifact | None) -> dict[str, Any]:
    facts = {} if artifact is None else artifact.facts
    memory, size = facts.get("peak_memory_bytes"), facts.get("bytes")
    return {
        "stage": entry["name"], "status": entry["status"], "seconds": facts.get("seconds"),
        "peak memory, MB": None if memory is None else round(memory / 1e6),
        "disk, MB": None if size is None else round(size / 1e6, 1), "digest": str(entry["digest"] or "")[:12],
    }  # fmt: skip


def _scores(record: Mapping[str, Any]) -> str:
    lines = ["| stage | prompt accuracy |", "|---|---|"]
    for stage, scores in (record.get("scores") or {}).items():
        if value := scores.get("prompt_accuracy"):
            lines.append(f"| {stage} | {value['value']:.3f} ({value['low']:.3f} to {value['high']:.3f}) |")
    return "\n".join(lines) if len(lines) > 2 else ""

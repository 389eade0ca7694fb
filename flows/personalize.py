"""A subject of one's own on top of a finished run: read its pictures, learn it, export the result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefect import flow

from flows.config import LifecycleConfig
from flows.dag import personalized
from flows.prefect_call import PrefectCall, flow_run_id
from flows.run import Run
from flows.shown import PrefectDisplay, show
from infra.artifacts import Artifact
from infra.config import parse
from infra.errors import ConfigError
from infra.stages import StageSpec
from infra.storage import Store, open_store
from models.personalization.config import DreamBoothConfig
from tasks.catalog import spec_of
from tasks.config import ExportConfig


@flow(name="personalize", flow_run_name="{stage.name}", persist_result=False)
def personalize_flow(run_id: str, stage: DreamBoothConfig, root: str = "runs") -> dict[str, Any]:
    """Learn one more subject on the checkpoint that `run_id` personalizes from; nothing of that run is done again."""
    return show(PrefectCall(root).execute(personalize_run(flow_run_id(stage.name), run_id, stage, root)))


def personalize_run(new_id: str, run_id: str, stage: DreamBoothConfig, root: str) -> Run:
    """The run that reads, learns and exports; training set and checkpoint are given from the recorded run."""
    store = open_store(root, create=False)
    recorded = store.read_run(run_id)
    config = parse(LifecycleConfig, recorded["config"], f"the record of run {recorded['run']}")
    start = config.personalize_from or config.chain[-1]
    given = {name: artifact_of(store, recorded, name) for name in ("encode", start)}
    about = {"name": stage.name, "flow": "personalize", "config": config.model_dump(mode="json"),
             "subject": stage.model_dump(mode="json"), "personalizes": recorded["run"]}  # fmt: skip
    run = config.run.model_copy(update={"root": root})
    return Run(new_id, own_specs(config, stage, start), run, about, display=PrefectDisplay(), given=given)


def own_specs(config: LifecycleConfig, stage: DreamBoothConfig, start: str) -> list[StageSpec]:
    """Read, learn, export; `encode` and `start` are given."""
    exported = f"{stage.name}-export"
    return [
        *personalized(stage, config.pretrain[-1].sampling.side, 0, start),
        spec_of(exported, "export", ExportConfig(name=exported), **{f"lora-{stage.label}": stage.name}),
    ]


def artifact_of(store: Store, record: Mapping[str, Any], stage: str) -> Artifact:
    """What a recorded run made in a stage."""
    entry: dict[str, Any] = next((entry for entry in record["stages"] if entry["name"] == stage), {})
    found = store.find(stage, entry["key"]) if entry.get("digest") else None
    if found is None:
        raise ConfigError(
            f"run {record['run']} has no result of stage {stage!r}; finish it with t2i run, then come back"
        )
    return found

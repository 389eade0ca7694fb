"""The lifecycle as a Prefect flow: curate, pre-train, post-train, personalize, distil, evaluate, export, report."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.config import LifecycleConfig
from flows.dag import stage_specs
from flows.prefect_call import PrefectCall, flow_run_id
from flows.run import Run
from flows.shown import PrefectDisplay, show


@flow(name="lifecycle", flow_run_name="{config.name}", persist_result=False)
def lifecycle_flow(config: LifecycleConfig = LifecycleConfig(), force: list[str] = []) -> dict[str, Any]:
    """Run every stage that has no artifact yet; returns the record of the run.

    Args:
        config: Every stage's settings; what has been made with the same ones before is reused
        force: Names of stages to run although their results are there
    """
    run = Run(
        flow_run_id(config.name),
        stage_specs(config),
        config.run,
        {"name": config.name, "config": config.model_dump(mode="json"), "force": force},
        force=force,
        display=PrefectDisplay(),
    )
    return show(PrefectCall(config.run.root).execute(run))

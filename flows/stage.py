"""One stage of a recorded run again, alone."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.config import LifecycleConfig
from flows.dag import stage_specs
from flows.prefect_call import PrefectCall, flow_run_id
from flows.run import Run
from flows.shown import PrefectDisplay, show
from infra.config import parse
from infra.storage import open_store


@flow(name="stage", flow_run_name="{stage} of {run_id}", persist_result=False)
def stage_flow(run_id: str = "latest", stage: str = "report", force: bool = True, root: str = "runs") -> dict[str, Any]:
    """Run one stage of a recorded run with that run's settings; stages before it are only looked up.

    Args:
        run_id: Name of the run, as `t2i status` lists it, or latest
        stage: Name of the stage
        force: Make it anew although its result is there
        root: Where the run's results are kept: folder, file:// or s3://
    """
    return show(PrefectCall(root).execute(run_one(run_id, stage, force, root)))


def run_one(run_id: str, stage: str, force: bool, root: str) -> Run:
    """The run that executes one stage of a recorded one."""
    recorded = open_store(root, create=False).read_run(run_id)
    config = parse(LifecycleConfig, recorded["config"], f"the record of run {recorded['run']}")
    config = config.model_copy(update={"run": config.run.model_copy(update={"root": root})})
    about = {"name": config.name, "config": recorded["config"], "rerun_of": recorded["run"], "force": [stage]}
    forced = [stage] if force else []
    new_id = flow_run_id(config.name)
    return Run(new_id, stage_specs(config), config.run, about, forced, display=PrefectDisplay(), only=stage)

"""`t2i up`: a Prefect server with its UI on loopback, and the three flows served as deployments."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from flows.config import LifecycleConfig
from flows.prefect_server import QUIET, PrefectServer

log = logging.getLogger(__name__)

POLL_SECONDS = "2"


def up(config: LifecycleConfig, home: Path, port: int = 4200, cron: str | None = "0 2 * * *") -> None:
    """Serve until interrupted; flows start as processes of their own with `config` as their default."""
    os.environ.update({name: os.environ.get(name, value) for name, value in QUIET.items()})
    os.environ["PREFECT_HOME"] = str(home)
    os.environ.setdefault("PREFECT_RUNNER_POLL_FREQUENCY", POLL_SECONDS)
    os.environ["PREFECT_RUNNER_SERVER_ENABLE"] = "false"
    server = PrefectServer(home, port, all_services=True)
    os.environ["PREFECT_API_URL"] = server.url
    try:
        from prefect import serve

        from flows.lifecycle import lifecycle_flow
        from flows.nightly import nightly_flow
        from flows.stage import stage_flow

        server.wait()
        parameters = {"config": config.model_dump(mode="json")}
        deployments = [
            lifecycle_flow.to_deployment("lifecycle", parameters=parameters, tags=["t2i"]),
            nightly_flow.to_deployment("nightly", parameters=parameters, cron=cron, tags=["t2i"]),
            stage_flow.to_deployment("stage", parameters={"root": config.run.root}, tags=["t2i"]),
        ]
        log.warning("Prefect serves lifecycle, nightly and stage at http://127.0.0.1:%d; Ctrl-C ends it", port)
        serve(*deployments, pause_on_shutdown=False, print_starting_message=False, limit=1)  # type: ignore[arg-type]
    finally:
        server.stop()

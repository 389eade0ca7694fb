"""`t2i up`: a Prefect server with its UI on loopback, and the three flows served as deployments."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from flows.config import LifecycleConfig
from infra.embedded import PrefectServer, environment, quiet_environment

log = logging.getLogger(__name__)

POLL_SECONDS = "2"


def up(config: LifecycleConfig, home: Path, port: int = 4200, cron: str | None = "0 2 * * *") -> None:
    """Serve until interrupted, on the server PREFECT_API_URL names or one of our own.

    Flows start as processes of their own with `config` as their default.
    """
    given = os.environ.get("PREFECT_API_URL")
    server = None if given else PrefectServer(home, port, all_services=True)
    url = given or (server.url if server else "")
    values: dict[str, str | None] = {
        **quiet_environment(),
        "PREFECT_API_URL": url,
        "PREFECT_HOME": str(home),
        "PREFECT_RUNNER_POLL_FREQUENCY": POLL_SECONDS,
        "PREFECT_RUNNER_SERVER_ENABLE": "false",
    }
    try:
        with environment(values):
            if server is not None:
                server.wait()
            _serve(url, config, cron)
    finally:
        if server is not None:
            server.stop()


def _serve(url: str, config: LifecycleConfig, cron: str | None) -> None:
    from prefect import serve

    from flows.lifecycle import lifecycle_flow
    from flows.nightly import nightly_flow
    from flows.stage import stage_flow

    parameters = {"config": config.model_dump(mode="json")}
    deployments: list[Any] = [
        lifecycle_flow.to_deployment("lifecycle", parameters=parameters, tags=["t2i"]),
        nightly_flow.to_deployment("nightly", parameters=parameters, cron=cron, tags=["t2i"]),
        stage_flow.to_deployment("stage", parameters={"root": config.run.root}, tags=["t2i"]),
    ]
    log.warning("Prefect serves lifecycle, nightly and stage at %s; Ctrl-C ends it", url.removesuffix("/api"))
    serve(*deployments, pause_on_shutdown=False, print_starting_message=False, limit=1)

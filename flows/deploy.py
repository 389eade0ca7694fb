"""`t2i up`: a Prefect server with its UI on loopback, and the three flows served as deployments."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from flows.config import LifecycleConfig
from infra.embedded import PrefectServer, environment, quiet_environment

log = logging.getLogger(__name__)

POLL_SECONDS = "2"


def up(config: LifecycleConfig, home: Path, port: int = 4200, cron: str | None = "0 2 * * *") -> None:
    """Serve until interrupted; flows start as processes of their own with `config` as their default."""
    server = PrefectServer(home, port, all_services=True)
    values: dict[str, str | None] = {
        **quiet_environment(),
        "PREFECT_API_URL": server.url,
        "PREFECT_HOME": str(home),
        "PREFECT_RUNNER_POLL_FREQUENCY": POLL_SECONDS,
        "PREFECT_RUNNER_SERVER_ENABLE": "false",
    }
    try:
        with environment(values):
            _serve(server, config, cron)
    finally:
        server.stop()


def _serve(server: PrefectServer, config: LifecycleConfig, cron: str | None) -> None:
    from prefect import serve

    from flows.lifecycle import lifecycle_flow
    from flows.nightly import nightly_flow
    from flows.stage import stage_flow

    server.wait()
    parameters = {"config": config.model_dump(mode="json")}
    deployments: list[Any] = [
        lifecycle_flow.to_deployment("lifecycle", parameters=parameters, tags=["t2i"]),
        nightly_flow.to_deployment("nightly", parameters=parameters, cron=cron, tags=["t2i"]),
        stage_flow.to_deployment("stage", parameters={"root": config.run.root}, tags=["t2i"]),
    ]
    log.warning("Prefect serves lifecycle, nightly and stage at http://127.0.0.1:%d; Ctrl-C ends it", server.port)
    serve(*deployments, pause_on_shutdown=False, print_starting_message=False, limit=1)

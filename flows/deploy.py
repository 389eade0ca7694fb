"""`t2i up` serves the three flows on a Prefect server; `t2i deploy` registers them for the workers of a work pool."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from flows.config import LifecycleConfig
from infra.config import Config
from infra.embedded import AUTH, PrefectServer, environment, quiet_environment
from infra.errors import ConfigError

if TYPE_CHECKING:
    from prefect.deployments.runner import RunnerDeployment

log = logging.getLogger(__name__)

POLL_SECONDS = "2"
DATABASE = "PREFECT_SERVER_DATABASE_CONNECTION_URL"
HANDED_ON = (AUTH, DATABASE, "PREFECT_UI_API_URL")  # from our environment to the server's


class Serving(Config):
    """How the flows are served."""

    host: str = Field(default="127.0.0.1", description="Address the server listens on")
    port: int = Field(default=4200, ge=1024, le=65535, description="Port of its UI and API")
    cron: str | None = Field(default="0 2 * * *", description="When nightly runs; null: never")
    gpu_slots: int = Field(default=1, ge=1, description="Training stages that may run at once, of all runs")
    notify: str | None = Field(default=None, description="Web address told of failed runs, such as a chat's webhook")
    silent_seconds: float = Field(default=600, ge=60, description="Without a heartbeat for so long a run is crashed")


def up(config: LifecycleConfig, home: Path, serving: Serving) -> None:
    """Serve until interrupted, on the server PREFECT_API_URL names or one of our own.

    Flows start as processes of their own with `config` as their default.
    """
    given = os.environ.get("PREFECT_API_URL")
    more = {name: os.environ[name] for name in HANDED_ON if os.environ.get(name)}
    server = None if given else PrefectServer(home, serving.port, True, serving.host, more)
    url = given or (server.url if server else "")
    values: dict[str, str | None] = {
        **quiet_environment(),
        "PREFECT_API_URL": url,
        "PREFECT_HOME": str(home),
        "PREFECT_RUNNER_POLL_FREQUENCY": POLL_SECONDS,
        "PREFECT_RUNNER_SERVER_ENABLE": "false",
    }
    if server is not None and AUTH in more:
        values["PREFECT_API_AUTH_STRING"] = more[AUTH]
    try:
        with environment(values):
            if server is not None:
                server.wait()
            _serve(url, config, serving)
    finally:
        if server is not None:
            server.stop()


def _serve(url: str, config: LifecycleConfig, serving: Serving) -> None:
    from prefect import serve

    from flows.automations import provision

    provision(serving.gpu_slots, serving.notify, serving.silent_seconds)
    log.warning("Prefect serves lifecycle, nightly and stage at %s; Ctrl-C ends it", url.removesuffix("/api"))
    found: Any = deployments(config, serving.cron)
    serve(*found, pause_on_shutdown=False, print_starting_message=False, limit=1)


def deployments(config: LifecycleConfig, cron: str | None) -> list[RunnerDeployment]:
    """lifecycle, nightly and stage with `config` as their default; a second night waits for nobody, it is left out."""
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.types.entrypoint import EntrypointType

    from flows.automations import TAG
    from flows.lifecycle import lifecycle_flow
    from flows.nightly import nightly_flow
    from flows.stage import stage_flow

    parameters = {"config": config.model_dump(mode="json")}
    one = ConcurrencyLimitConfig(limit=1)
    alone = ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW)
    same: dict[str, Any] = {"tags": [TAG], "entrypoint_type": EntrypointType.MODULE_PATH}
    made: list[Any] = [
        lifecycle_flow.to_deployment("lifecycle", parameters=parameters, concurrency_limit=one, **same),
        nightly_flow.to_deployment("nightly", parameters=parameters, cron=cron, concurrency_limit=alone, **same),
        stage_flow.to_deployment("stage", parameters={"root": config.run.root}, concurrency_limit=one, **same),
    ]
    return made


def deploy(config: LifecycleConfig, pool: str, image: str | None, serving: Serving) -> list[str]:
    """Register the three at the server PREFECT_API_URL names, for workers of `pool`; returns their names."""
    url = os.environ.get("PREFECT_API_URL")
    if not url:
        raise ConfigError("t2i deploy talks to a Prefect server; set PREFECT_API_URL, or use t2i up, which starts one")
    with environment({**quiet_environment()}):
        from prefect.client.orchestration import get_client
        from prefect.exceptions import ObjectNotFound

        from flows.automations import provision

        with get_client(sync_client=True) as client:
            try:
                client.read_work_pool(pool)
            except ObjectNotFound:
                hint = "prefect work-pool create --type process (or kubernetes)"
                raise ConfigError(f"the server at {url} has no work pool {pool!r}; make it: {hint} {pool}") from None
        provision(serving.gpu_slots, serving.notify, serving.silent_seconds)
        made = deployments(config, serving.cron)
        for deployment in made:
            deployment.apply(work_pool_name=pool, image=image)
    return [f"{deployment.flow_name}/{deployment.name}" for deployment in made]

"""A server of one run: in this process with uvicorn, or as a Ray Serve deployment."""

from __future__ import annotations

import os
from typing import Any

from infra.embedded import local_ray
from infra.errors import ConfigError
from infra.records import lifecycles
from infra.stages import Resources
from infra.storage import Store, open_store
from tasks.serving.config import ServeConfig

KEY = "T2I_SERVE_KEY"  # environment variable with the bearer key
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def refuse_open(host: str, key: str | None) -> None:
    """A server that others can reach needs a key."""
    if host not in LOOPBACK and not key:
        raise ConfigError(
            f"--host {host} can be reached from outside; set {KEY} to a key of your own, or use 127.0.0.1"
        )
    if key is not None and len(key) < 16:
        raise ConfigError(f"{KEY} has {len(key)} characters; use at least 16, such as `openssl rand -hex 16`")


def build(root: str, run: str, config: ServeConfig, key: str | None, hosts: list[str] | None) -> Any:
    """The ASGI application of a run; with `latest`, later runs of its name and a newly promoted champion take over."""
    from tasks.serving.app import create_app
    from tasks.serving.engine import Engine
    from tasks.serving.models import Models, champion, models_of

    store = open_store(root, create=False)
    lifecycle = str(store.read_run(run).get("name"))
    following = run == "latest"
    engine = Engine(models_of(store, run, config.mixes, champion(store, lifecycle) if following else None), config)
    engine.models.generator(engine.models.find(None), ())  # loaded before the first request

    def follow() -> Models | None:
        later, best = later_run(store, engine.models.run), champion(store, lifecycle)
        if later is None and (best is None or best.digest == engine.models.champion):
            return None
        return models_of(store, later or engine.models.run, config.mixes, best)

    return create_app(engine, config, key, follow if following else None, hosts)


def later_run(store: Store, served: str) -> str | None:
    """The newest finished run of the same lifecycle, if it is not the one served; nights, reruns and ablations are none."""
    finished = lifecycles(store.list_runs(), str(store.read_run(served).get("name")))
    return str(finished[0]["run"]) if finished and finished[0]["run"] != served else None


def serve_here(root: str, run: str, host: str, port: int, config: ServeConfig) -> None:
    """Serve until Ctrl-C or SIGTERM; running requests are finished."""
    import uvicorn

    key = os.environ.get(KEY) or None
    refuse_open(host, key)
    app = build(root, run, config, key, None if host in LOOPBACK else ["*"])
    uvicorn.run(
        app, host=host, port=port, log_level="warning", access_log=False, server_header=False,
        timeout_graceful_shutdown=int(config.drain_seconds) + 1,
    )  # fmt: skip


def ray_deployment(root: str, run: str, config: ServeConfig, key: str | None = None, replicas: int = 1) -> Any:
    """The same application as a Ray Serve deployment, each replica with its own engine."""
    from ray import serve

    class Pictures:
        """The ingress; all of it is the ASGI application."""

    ingress = serve.ingress(lambda: build(root, run, config, key, ["*"] if key else None))(Pictures)
    deployment = serve.deployment(
        name="t2i", num_replicas=replicas, max_ongoing_requests=2 * config.queue,
        ray_actor_options={"num_cpus": config.threads},
    )  # fmt: skip
    return deployment(ingress).bind()


def serve_on_ray(root: str, run: str, host: str, port: int, config: ServeConfig, replicas: int) -> None:
    """Serve with replicas on Ray, a running cluster (RAY_ADDRESS) or one of its own, until Ctrl-C."""
    from ray import serve

    key = os.environ.get(KEY) or None
    refuse_open(host, key)
    address = os.environ.get("RAY_ADDRESS") or None
    with local_ray(Resources(num_workers=replicas, threads_per_worker=config.threads, ray_address=address)):
        serve.start(http_options={"host": host, "port": port})
        serve.run(ray_deployment(root, run, config, key, replicas), name="t2i", blocking=True)

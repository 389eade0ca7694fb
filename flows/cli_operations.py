"""Commands of `t2i` for who runs it: servers and deployments, the champion, old artifacts."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Annotated

import typer

from flows.cli_parts import Debug, Json, Preset, Root, Set, read_config, say

app = typer.Typer()
Cron = Annotated[str, typer.Option(help="When nightly runs; empty: never")]
Slots = Annotated[int, typer.Option(min=1, help="Training stages that may run at once, of all runs of the server")]
Notify = Annotated[str | None, typer.Option(help="Web address told of failed runs, such as a chat's webhook")]


@app.command()
def up(preset: Preset = Path("presets/demo.yaml"), set_: Set = None, root: Root = None, host: Annotated[str, typer.Option(help="Address to listen on; beyond loopback only with a password in PREFECT_SERVER_API_AUTH_STRING")] = "127.0.0.1", port: Annotated[int, typer.Option(min=1024, max=65535)] = 4200, cron: Cron = "0 2 * * *", gpu_slots: Slots = 1, notify: Notify = None, debug: Debug = False) -> None:  # fmt: skip
    """Serve Prefect's UI on this machine, with lifecycle, nightly and stage to start from it."""
    from flows import deploy
    from flows.drive import home_of

    config = read_config(preset, set_, root)
    serving = deploy.Serving(host=host, port=port, cron=cron or None, gpu_slots=gpu_slots, notify=notify)
    with contextlib.suppress(KeyboardInterrupt):
        deploy.up(config, home_of(config.run.root), serving)


@app.command()
def deploy(preset: Preset, pool: Annotated[str, typer.Option(help="Work pool whose workers run the flows")], image: Annotated[str | None, typer.Option(help="Image of a Kubernetes or Docker pool")] = None, set_: Set = None, root: Root = None, cron: Cron = "0 2 * * *", gpu_slots: Slots = 1, notify: Notify = None, as_json: Json = False, debug: Debug = False) -> None:  # fmt: skip
    """Register lifecycle, nightly and stage at the Prefect server that PREFECT_API_URL names."""
    from flows import deploy

    serving = deploy.Serving(cron=cron or None, gpu_slots=gpu_slots, notify=notify)
    names = deploy.deploy(read_config(preset, set_, root), pool, image, serving)
    say(json.dumps(names) if as_json else "\n".join(names))

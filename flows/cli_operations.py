"""Commands of `t2i` for who runs it: servers and deployments, the champion, old artifacts."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Annotated

import typer

from flows.cli_parts import Debug, Json, Preset, Root, RunRoot, Set, read_config, say

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


@app.command()
def champion(name: Annotated[str | None, typer.Argument(help="Name of the lifecycle; none: all")] = None, rollback: Annotated[bool, typer.Option("--rollback", help="Go back to the champion before this one")] = False, root: RunRoot = "runs", as_json: Json = False, debug: Debug = False) -> None:  # fmt: skip
    """Show which model is in use and how it came to be; --rollback takes the one before."""
    from infra.errors import ConfigError
    from infra.pointers import moves
    from infra.pointers import rollback as take_back
    from infra.storage import open_store

    store = open_store(root, create=False)
    names = [f"{name}-champion"] if name else [each for each in store.pointers() if each.endswith("-champion")]
    if rollback:
        if name is None:
            raise ConfigError(f"say whose champion is rolled back: {', '.join(names) or 'there is none yet'}")
        take_back(store, names[0])
    found = {each.removesuffix("-champion"): moves(store, each) for each in names}
    if as_json:
        shown = {each: [m.model_dump(mode="json", exclude={"artifact", "beside"}) | {"digest": m.artifact.digest, "uri": m.artifact.uri} for m in past] for each, past in found.items()}  # fmt: skip
        say(json.dumps(shown[name][-1] if name else shown))
        return
    for each, past in found.items():
        if not past:
            raise ConfigError(
                f"{each!r} has no champion in {root}; the first night sets it: t2i up, or the nightly flow"
            )
        for m in past:
            mark = "*" if m is past[-1] else " "
            say(f"{mark} {each} {m.generation:>3}  {m.at[:16]}  {m.artifact.digest[:12]}  {m.run}: {m.why}")


@app.command()
def gc(root: RunRoot = "runs", grace_days: Annotated[float, typer.Option(min=0, help="Never touch what was made within so many days")] = 7, forget: Annotated[list[str] | None, typer.Option(help="Name of a run whose record goes too, with what only it needs")] = None, delete: Annotated[bool, typer.Option("--delete", help="Remove it; otherwise only say what could go")] = False, as_json: Json = False, debug: Debug = False) -> None:  # fmt: skip
    """Find artifacts that no recorded run, no champion and no lineage of these needs."""
    from flows.gc import garbage, gc_lines, sweep
    from infra.storage import open_store

    store = open_store(root, create=False)
    found = (sweep if delete else garbage)(store, grace_days, forget or ())
    if as_json:
        places = [f"{artifact.stage}/{key}" for artifact, key, _ in found.artifacts]
        say(json.dumps({"artifacts": places, "scratch": [folder for folder, _ in found.scratch], "remote": found.remote, "bytes": found.num_bytes, "kept": found.kept, "young": found.young, "deleted": delete}))  # fmt: skip
    else:
        say("\n".join(gc_lines(found, delete)))

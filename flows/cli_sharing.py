"""Commands of `t2i` that show or give away what was made: a published model, two runs on one page, another average."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from flows.cli_parts import Debug, Json, RunRoot, say

app = typer.Typer()


@app.command()
def publish(what: Annotated[str, typer.Argument(help="Checkpoint or adapter: a stage, an export such as student-4, a folder, a digest")], target: Annotated[str, typer.Argument(help="Folder to write, or hf://OWNER/NAME with a token in HF_TOKEN")], run: Annotated[str, typer.Option(help="Run in which a stage is looked up")] = "latest", steps: Annotated[int | None, typer.Option(min=1, help="Step count of a student that has several [default: its own]")] = None, base: Annotated[str | None, typer.Option(help="OWNER/NAME of the published model that an adapter or student belongs to")] = None, licence: Annotated[str | None, typer.Option(help="The Hub's licence id [default: the one that all training pictures carry, else other]")] = None, merged: Annotated[bool, typer.Option("--merged", help="Publish a personalised model whole, not its adapter")] = False, anyway: Annotated[bool, typer.Option("--anyway", help="Publish although a gate was missed; the card says so")] = False, public: Annotated[bool, typer.Option("--public", help="Make a new repository public")] = False, root: RunRoot = "runs", as_json: Json = False, debug: Debug = False) -> None:  # fmt: skip
    """Write a model with its card and lineage to a folder, or push it to the Hub."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when huggingface_hub is imported
    from infra.storage import open_store
    from tasks.publish import Wish
    from tasks.publish import publish as give_away

    wish = Wish(run=run, steps=steps, base=base, licence=licence, merged=merged, anyway=anyway, public=public)
    found = give_away(open_store(root, create=False), what, target, wish)
    if as_json:
        say(json.dumps(found))
        return
    say(f"published {found['stage']} {found['digest'][:12]} to {found['target']}")
    for reason in found["missed"]:
        say(f"missed gate: {reason}")


@app.command()
def compare(first: Annotated[str, typer.Argument(help="Name of a run, or latest")], second: Annotated[str, typer.Argument(help="Name of another run")], out: Annotated[Path, typer.Option("--out", "-o", help="The page to write")] = Path("compare.html"), root: RunRoot = "runs", second_root: Annotated[str | None, typer.Option(help="Where the second run is kept [default: --root]")] = None, debug: Debug = False) -> None:  # fmt: skip
    """Put two runs on one page: settings that differ, scores, pictures, curves, data."""
    from infra.storage import open_store
    from tasks.report_compare import Side, compare_page

    stores = [open_store(place, create=False) for place in (root, second_root or root)]
    page = compare_page(*(Side.of(store, run) for store, run in zip(stores, (first, second), strict=True)))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    say(str(out))


@app.command()
def average(what: Annotated[str, typer.Argument(help="Checkpoint of a stage with train.ema_snapshot_every: the stage's name, or a digest")], out: Annotated[Path, typer.Argument(help="Folder to write")], gamma: Annotated[float, typer.Option(min=1, max=100, help="Power of the average, as train.ema_gamma; larger is shorter")], at: Annotated[int | None, typer.Option(min=1, help="Step it ends at [default: the last snapshot's]")] = None, run: Annotated[str, typer.Option(help="Run in which a stage is looked up")] = "latest", root: RunRoot = "runs", as_json: Json = False, debug: Debug = False) -> None:  # fmt: skip
    """Write a checkpoint with another average of its weights, put together from a stage's snapshots."""
    from dataclasses import asdict

    from infra.errors import ConfigError
    from infra.lineage import Graph
    from infra.storage import open_store
    from tasks.averages import other_average
    from tasks.lineage import target

    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty; name a new folder")
    store = open_store(root, create=False)
    made = other_average(store.local(target(store, Graph(store.list()), what, run)), out, gamma, at)
    if as_json:
        say(json.dumps({"folder": str(out), **asdict(made)}))
        return
    say(
        f"{out}: gamma {made.gamma:g} at step {made.step}, of {made.snapshots} snapshots, profile missed by {made.misfit:.1%}"
    )

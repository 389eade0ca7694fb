"""Commands of `t2i` that answer from what was made: where it is from, what it went into, and pictures as a server."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from flows.cli_parts import Debug, Json, RunName, RunRoot, say

app = typer.Typer()


@app.command()
def lineage(what: Annotated[str, typer.Argument(help="A picture that t2i drew, a checkpoint, adapter or export folder, a stage, a digest")], run: Annotated[str, typer.Option(help="Run in which a stage is looked up")] = "latest", urls: Annotated[Path | None, typer.Option(help="Write every picture behind it to this file: .csv or .parquet")] = None, root: RunRoot = "runs", as_json: Json = False, debug: Debug = False) -> None:  # fmt: skip
    """Say what something was made from, back to the URLs."""
    from flows.tracing import back

    found, lines = back(what, run, urls, root)
    say(json.dumps(found) if as_json else "\n".join(lines))


@app.command()
def impact(what: Annotated[str, typer.Argument(help="A URL, a row id, a sha256, or a picture file")], root: RunRoot = "runs", as_json: Json = False, debug: Debug = False) -> None:  # fmt: skip
    """Say which checkpoints learnt from a picture, and what was made from them: the take-down question."""
    from flows.tracing import forward

    found, lines = forward(what, root)
    say(json.dumps(found) if as_json else "\n".join(lines))


@app.command()
def serve(name: RunName = "latest", host: Annotated[str, typer.Option(help="Address to listen on; beyond this machine T2I_SERVE_KEY must be set")] = "127.0.0.1", port: Annotated[int, typer.Option(min=1024, max=65535)] = 8000, replicas: Annotated[int, typer.Option(min=0, max=1000, help="Replicas on Ray Serve; 0: this process alone")] = 0, root: RunRoot = "runs", debug: Debug = False) -> None:  # fmt: skip
    """Serve a run's models: a page that draws as you type, and OpenAI's images API."""
    from tasks.serving.config import ServeConfig
    from tasks.serving.server import serve_here, serve_on_ray

    sys.stderr.write(f"serving run {name}: http://{host}:{port} (Ctrl-C ends it)\n")
    if replicas:
        serve_on_ray(root, name, host, port, ServeConfig(), replicas)
    else:
        serve_here(root, name, host, port, ServeConfig())

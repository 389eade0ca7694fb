"""What the commands of `t2i` share: their options, the preset they read, and how they answer."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from flows.config import LifecycleConfig

Preset = Annotated[Path, typer.Argument(help="YAML file, such as presets/demo.yaml")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Change one value: --set pretrain.0.train.steps=500")]
Root = Annotated[
    str | None, typer.Option(help="Where results are kept: folder, file:// or s3:// [default: the preset's]")
]
RunRoot = Annotated[str, typer.Option(help="Where results are kept")]
RunName = Annotated[str, typer.Argument(help="Name of a run, or latest")]
Force = Annotated[list[str] | None, typer.Option("--force", help="Run this stage although its result is there")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON line instead of text")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the log of every part")]


def read_config(preset: Path, changes: list[str] | None, root: str | None) -> LifecycleConfig:
    """The preset with the changes of the command line."""
    from flows.config import LifecycleConfig
    from infra.config import load_yaml, parse

    more = [f"run.root={json.dumps(root)}"] if root else []
    return parse(LifecycleConfig, load_yaml(preset, [*(changes or []), *more]), str(preset))


def say(text: str) -> None:
    """Answer on stdout."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()

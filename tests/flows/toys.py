"""Toy stages with real files: small enough for a second, shaped like a lifecycle. Also a script for the kill tests."""

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

from pydantic import Field

from infra.config import Config, versioned
from infra.errors import DataRefused, GateFailed
from infra.stages import StageContext, StageSpec
from tasks.catalog import StageFunction

log = logging.getLogger("tasks.toys")


class ToyConfig(Config):
    value: int = 1
    steps: int = 3
    pause: float = Field(default=0.0, json_schema_extra={"versioned": False})
    fail_unless: str | None = Field(default=None, json_schema_extra={"versioned": False})
    gate: str | None = None


def count(name: str) -> None:
    """One line per execution, in the file that the test reads."""
    if "TOY_COUNTS" in os.environ:
        with Path(os.environ["TOY_COUNTS"]).open("a") as stream:
            stream.write(f"{name}\n")


def read(ctx: StageContext) -> dict[str, Any]:
    return {role: json.loads((folder / "value.json").read_text()) for role, folder in sorted(ctx.inputs.items())}


def make(config: ToyConfig, ctx: StageContext) -> dict[str, Any]:
    count(ctx.name)
    if config.fail_unless and not Path(config.fail_unless).exists():
        raise DataRefused(f"toy {ctx.name} waits for {config.fail_unless}")
    if config.gate == "strict":
        raise GateFailed("toy gate: 0 < 1")
    log.info("makes %d with %s", config.value, os.environ.get("TOY_API_KEY", "no key"))
    doubled = ctx.fan_out(double, [config.value, *range(3)])
    (ctx.out / "value.json").write_text(json.dumps({"doubled": doubled, "inputs": read(ctx)}, sort_keys=True))
    gates = (
        [{"stage": "sft", "metric": "toy", "passed": False, "reason": "toy gate: 0 < 1"}]
        if config.gate == "report"
        else []
    )
    return {"gates": gates, "value": config.value}


def double(value: int) -> int:
    return 2 * value


def train(config: ToyConfig, ctx: StageContext) -> dict[str, Any]:
    """Counts to `steps` with a checkpoint a step, going on from where a kill left it."""
    if rank() != 0:
        return {}
    count(ctx.name)
    state = ctx.scratch / "state.json"
    trail = json.loads(state.read_text()) if state.exists() else []
    while len(trail) < config.steps:
        time.sleep(config.pause)
        trail.append(config.value * (len(trail) + 1))
        fresh = state.with_suffix(".new")
        fresh.write_text(json.dumps(trail))
        fresh.replace(state)
        ctx.progress(len(trail), config.steps, {"loss": 1.0 / len(trail)})
    (ctx.out / "value.json").write_text(json.dumps({"trail": trail, "inputs": read(ctx)}, sort_keys=True))
    return {"steps": len(trail)}


def rank() -> int:
    torch = sys.modules.get("torch")
    return torch.distributed.get_rank() if torch and torch.distributed.is_initialized() else 0


def crash(config: ToyConfig, ctx: StageContext) -> dict[str, Any]:
    """Dies with its process the first time."""
    if rank() != 0:
        return {}
    count(ctx.name)
    mark = ctx.scratch / "died"
    if not mark.exists():
        mark.touch()
        os._exit(9)
    (ctx.out / "value.json").write_text("{}")
    return {}


def toy_function(name: str) -> StageFunction:
    return StageFunction(ToyConfig, {"make": make, "train": train, "crash": crash}[name])


def toy(name: str, function: str = "make", config: ToyConfig | None = None, **inputs: str) -> StageSpec:
    config = config or ToyConfig()
    runs = "local" if function == "make" else "train"
    return StageSpec(
        name=name, function=function, kind="toy", runs=runs, config=config.model_dump(mode="json"),
        versioned=versioned(config), inputs=inputs,
    )  # fmt: skip


def toy_line(**configs: ToyConfig) -> list[StageSpec]:
    """source -> pretrain -> sft -> report, with a judge on the side."""
    return [
        toy("source", "make", configs.get("source")),
        toy("judge", "make", configs.get("judge")),
        toy("pretrain", "train", configs.get("pretrain"), data="source"),
        toy("sft", "train", configs.get("sft"), data="source", init="pretrain"),
        toy("report", "make", configs.get("report"), judge="judge", model="sft"),
    ]


def main(root: str) -> None:
    """The toy lifecycle as a process of its own, slow enough to be killed anywhere."""
    from flows.config import RunConfig
    from flows.run import Run

    slow = ToyConfig(steps=12, pause=0.02)
    run = Run("toy", toy_line(pretrain=slow, sft=slow), RunConfig(root=root), {"name": "toy"}, catalog=toy_function)
    run.execute()


if __name__ == "__main__":
    main(sys.argv[1])

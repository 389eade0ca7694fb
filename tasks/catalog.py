"""Every stage function by name: what it makes, its configuration class, and the callable, imported when it is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from infra.config import Config, versioned
from infra.errors import ConfigError
from infra.stages import StageContext, StageSpec


@dataclass(frozen=True)
class StageFunction:
    """A stage function with the class of its configuration."""

    config: type[Config]
    run: Callable[[Any, StageContext], dict[str, Any]]


@dataclass(frozen=True)
class Traits:
    """What a plan must know of a function without importing it; raise `version` when its meaning changes."""

    kind: str
    runs: Literal["local", "train"] = "local"
    version: int = 1


Catalog: TypeAlias = Callable[[str], StageFunction]

TRAITS: dict[str, Traits] = {
    "publish_demo_web": Traits("source"),
    "read_source": Traits("source"),
    "download": Traits("manifest"),
    "deduplicate": Traits("manifest"),
    "filter_quality": Traits("manifest"),
    "assign_buckets": Traits("manifest"),
    "encode": Traits("training-set"),
    "train_judge": Traits("judge"),
    "pretrain": Traits("checkpoint", runs="train"),
    "evaluate": Traits("scores"),
    "report": Traits("report"),
}


def spec_of(name: str, function: str, config: Config, **inputs: str) -> StageSpec:
    """The spec of one stage; `inputs` are role=stage."""
    traits = TRAITS.get(function)
    if traits is None:
        raise ConfigError(f"stage {name!r} asks for the function {function!r}, which tasks/catalog.py does not list")
    return StageSpec(
        name=name,
        function=function,
        version=traits.version,
        kind=traits.kind,
        runs=traits.runs,
        config=config.model_dump(mode="json"),
        versioned=versioned(config),
        inputs=inputs,
    )


def stage_function(name: str) -> StageFunction:
    """Import one stage function; only the process that runs it pays for its imports."""
    raise NotImplementedError(name)

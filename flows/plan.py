"""What a run would do, stage by stage, and why; the live run decides by the same function."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from flows.config import RunConfig
from infra.artifacts import Artifact
from infra.config import Config
from infra.errors import ArtifactCorrupted, ConfigError
from infra.stages import StageSpec, stage_key
from infra.storage import Store

MAX_CHANGES = 3
History = Mapping[str, Artifact]  # stage name -> the artifact of it that was made last


class PlanRow(Config):
    """One stage of a plan."""

    stage: str = Field(description="Name of the stage")
    state: Literal["HIT", "RUN", "RUN?"] = Field(
        description="RUN?: an input is made first; an equal one would be a HIT"
    )
    reason: str = Field(description="Why")
    seconds: float | None = Field(default=None, description="Time it took last")
    memory_bytes: int | None = Field(default=None, description="Peak memory it took last")
    disk_bytes: int | None = Field(default=None, description="Size of what it made last")
    key: str | None = Field(default=None, description="Content key, when every input is known")
    artifact: Artifact | None = Field(default=None, description="What is reused")
    damaged: bool = Field(default=False, description="There is an artifact, but its record cannot be read")


def plan(specs: Sequence[StageSpec], store: Store, force: Sequence[str] = ()) -> list[PlanRow]:
    """Every stage with HIT, RUN or RUN? and the reason."""
    refuse_unknown(specs, force)
    past = history(store)
    rows: dict[str, PlanRow] = {}
    for spec in specs:
        rows[spec.name] = decide(spec, store, _known(rows), past, spec.name in force)
    return list(rows.values())


def decide(
    spec: StageSpec, store: Store, artifacts: Mapping[str, Artifact], past: History, force: bool = False
) -> PlanRow:
    """Whether one stage is reused, given the artifacts that are there so far."""
    before = past.get(spec.name)
    usual = _usual(spec, before)
    waiting = [stage for stage in spec.inputs.values() if stage not in artifacts]
    if waiting:
        differs = changes(spec, {}, before)
        state: Literal["RUN", "RUN?"] = "RUN" if force or differs or before is None else "RUN?"
        why = "forced" if force else "; ".join(differs) or f"{waiting[0]} is made first"
        return PlanRow(stage=spec.name, state=state, reason=why, **usual)
    digests = {role: artifacts[stage].digest for role, stage in spec.inputs.items()}
    key = stage_key(spec, digests)
    try:
        found = store.find(spec.name, key)
    except ArtifactCorrupted as error:
        reason = f"damaged: {error}"
        return PlanRow(stage=spec.name, state="RUN", reason=reason, key=key, damaged=True, **usual)
    if found is not None and not force:
        return PlanRow(
            stage=spec.name, state="HIT", reason="made before", key=key, artifact=found, **_usual(spec, found)
        )
    why = "forced" if force else "; ".join(changes(spec, digests, before)) or "not made yet"
    return PlanRow(stage=spec.name, state="RUN", reason=why, key=key, **usual)


def _usual(spec: StageSpec, before: Artifact | None) -> dict[str, Any]:
    """Time, memory and disk that the stage took last; time in proportion to its training steps."""
    if before is None:
        return {}
    facts, steps, old = before.facts, _steps(spec.versioned), _steps(before.facts.get("versioned", {}))
    seconds = facts.get("seconds")
    if seconds is not None and steps and old:
        seconds = seconds * steps / old
    return {"seconds": seconds, "memory_bytes": facts.get("peak_memory_bytes"), "disk_bytes": facts.get("bytes")}


def _steps(versioned: Mapping[str, Any]) -> int | None:
    train = versioned.get("train")
    return train.get("steps") if isinstance(train, dict) else None


def changes(spec: StageSpec, digests: Mapping[str, str], before: Artifact | None) -> list[str]:
    """What differs from the stage's last artifact, in words; nothing when there is none."""
    if before is None:
        return []
    facts = before.facts
    if facts.get("function") != spec.function:
        return [f"function {facts.get('function')} -> {spec.function}"]
    if facts.get("version") != spec.version:
        return [f"version {facts.get('version')} -> {spec.version}"]
    found = list(_differences(facts.get("versioned", {}), spec.versioned))
    old = facts.get("inputs", {})
    found += [f"input {role} changed" for role, digest in digests.items() if old.get(role) != digest]
    more = [f"{len(found) - MAX_CHANGES} more"] if len(found) > MAX_CHANGES else []
    return found[:MAX_CHANGES] + more


def _differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (left, right) in enumerate(zip(old, new, strict=True)):
            yield from _differences(left, right, f"{path}.{number}")
    elif old != new:
        yield f"{path} {_short(old)} -> {_short(new)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def history(store: Store) -> dict[str, Artifact]:
    """The artifact of each stage that was made last."""
    newest: dict[str, Artifact] = {}
    for artifact in store.list():
        known = newest.get(artifact.stage)
        if known is None or str(artifact.facts.get("finished", "")) >= str(known.facts.get("finished", "")):
            newest[artifact.stage] = artifact
    return newest


def _known(rows: Mapping[str, PlanRow]) -> dict[str, Artifact]:
    return {name: row.artifact for name, row in rows.items() if row.artifact is not None}


def refuse_unknown(specs: Sequence[StageSpec], names: Sequence[str]) -> None:
    """A stage asked for by name must be one of the plan's."""
    known = [spec.name for spec in specs]
    for name in names:
        if name not in known:
            raise ConfigError(f"there is no stage {name!r}; the stages are {', '.join(known)}")


def cost(rows: Sequence[PlanRow], run: RunConfig) -> float | None:
    """Price of the stages to run, by the time they took last and what their workers cost; None without a price."""
    found = []
    for row in rows:
        on = run.resources_of(row.stage)
        if row.state != "HIT" and on.hourly_price is not None:
            found.append((row.seconds or 0.0) / 3600 * on.num_workers * on.hourly_price)
    return sum(found) if found else None


def estimate(rows: Sequence[PlanRow]) -> tuple[float, int]:
    """Seconds the stages to run took last, and how many of them never ran."""
    todo = [row for row in rows if row.state != "HIT"]
    return sum(row.seconds or 0.0 for row in todo), sum(row.seconds is None for row in todo)

"""A pointer: a name for an artifact that may change, with all its history; it moves by compare-and-swap, never by writing."""

from __future__ import annotations

import json
from datetime import UTC, datetime

from pydantic import Field, ValidationError

from infra.artifacts import Artifact
from infra.config import Config
from infra.errors import ConfigError, LifecycleError
from infra.storage import Store


class Move(Config):
    """One place a pointer has been at."""

    generation: int = Field(ge=1, description="Counts the moves")
    origin: int = Field(ge=1, description="Generation that first pointed here; smaller after a rollback")
    artifact: Artifact = Field(description="What it pointed at")
    beside: dict[str, tuple[Artifact, ...]] = Field(default_factory=dict, description="What belongs to it, by role")
    run: str = Field(description="Run that moved it")
    why: str = Field(description="Why, in words")
    at: str = Field(description="When, UTC")


def champion_of(lifecycle: str) -> str:
    """Name of the pointer to the model of a lifecycle that is in use."""
    return f"{lifecycle}-champion"


def moves(store: Store, name: str) -> tuple[Move, ...]:
    """Every move of a pointer, oldest first; the last one is where it points. Empty when there is no such pointer."""
    return _read(store, name)[1]


def move(
    store: Store, name: str, seen: int, artifact: Artifact, run: str, why: str,
    beside: dict[str, tuple[Artifact, ...]] | None = None, origin: int | None = None,
) -> Move:  # fmt: skip
    """Point at `artifact` if the pointer is still at generation `seen` (0: there is none); the same move twice is one."""
    raw, before = _read(store, name)
    last = before[-1] if before else None
    if last is not None and (last.artifact, last.run) == (artifact, run):
        return last
    now = datetime.now(UTC).isoformat(timespec="seconds")
    number = seen + 1
    made = Move(generation=number, origin=origin or number, artifact=artifact, beside=beside or {}, run=run, why=why,
                at=now)  # fmt: skip
    body = {"moves": [each.model_dump(mode="json") for each in (*before, made)]}
    data = (json.dumps(body, indent=1, sort_keys=True) + "\n").encode()
    if (last.generation if last else 0) != seen or not store.swap_pointer(name, raw, data):
        raise LifecycleError(
            f"pointer {name!r} was moved by another run since this one began (it was at generation {seen}); "
            "start again from where it points now"
        )
    return made


def rollback(store: Store, name: str, run: str = "by hand") -> Move:
    """Point where the pointer was before what it points at now was first chosen; nothing is forgotten."""
    past = moves(store, name)
    if not past:
        raise ConfigError(f"there is no pointer {name!r} in {store.root}; it has {store.pointers() or 'none'}")
    chosen = past[-1].origin - 1  # place of the move that first chose what it points at now
    if chosen == 0:
        raise ConfigError(f"pointer {name!r} was never anywhere else than at {past[-1].artifact.digest[:12]}")
    to = past[past[chosen - 1].origin - 1]
    why = f"rollback from generation {past[-1].generation} to {to.generation}"
    return move(store, name, past[-1].generation, to.artifact, f"{run}, {why}", why, to.beside, to.origin)


def _read(store: Store, name: str) -> tuple[bytes | None, tuple[Move, ...]]:
    raw = store.read_pointer(name)
    if raw is None:
        return None, ()
    try:
        return raw, tuple(Move.model_validate(each) for each in json.loads(raw)["moves"])
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise LifecycleError(
            f"pointer {name!r} of {store.root} is damaged: {error}; restore pointers/{name}.json"
        ) from error

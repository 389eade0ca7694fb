"""Which artifacts nothing needs any more: found by what records and pointers need, and the lineage of that."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pydantic import Field

from infra.artifacts import Artifact
from infra.config import Config
from infra.encode_cache import forget_space, spaces_unused_since
from infra.errors import ConfigError
from infra.pointers import moves
from infra.storage import Store


class Garbage(Config):
    """What could go."""

    artifacts: tuple[tuple[Artifact, str, int], ...] = Field(description="Artifact, key and bytes")
    scratch: tuple[tuple[str, int], ...] = Field(description="Working folders left by dead runs, and bytes")
    remote: tuple[str, ...] = Field(default=(), description="Checkpoints that dead runs left in the bucket")
    encoded: tuple[str, ...] = Field(default=(), description="Kept encodings that no run has opened lately")
    kept: int = Field(description="Artifacts that something needs")
    young: int = Field(description="Artifacts that nothing needs, but made within the grace period")

    @property
    def num_bytes(self) -> int:
        """Bytes of all of it."""
        return sum(each[2] for each in self.artifacts) + sum(each[1] for each in self.scratch)


def garbage(store: Store, grace_days: float, forget: Sequence[str] = ()) -> Garbage:
    """Artifacts that no record (but those of `forget`), no pointer and no lineage of these needs, older than the grace."""
    there = [(artifact, store.key_of(artifact)) for artifact in store.list()]
    parents = {artifact.digest: artifact.parents for artifact, _ in there}
    entries, digests = _roots(store, forget)
    digests |= {artifact.digest for artifact, key in there if (artifact.stage, key) in entries}
    needed, todo = set[str](), list(digests)
    while todo:
        if (digest := todo.pop()) not in needed:
            needed.add(digest)
            todo.extend(parents.get(digest, ()))
    unneeded = [(artifact, key) for artifact, key in there if artifact.digest not in needed]
    limit = datetime.now(UTC) - timedelta(days=grace_days)
    old = [pair for pair in unneeded if _finished(pair[0]) < limit]
    return Garbage(
        artifacts=tuple((artifact, key, store.size(artifact.stage, key)) for artifact, key in old),
        scratch=tuple(_scratch(store, grace_days)),
        remote=tuple(sorted(name for name, saved in store.remote_works().items() if saved < limit.timestamp())),
        encoded=spaces_unused_since(store.root, limit.timestamp()), kept=len(there) - len(unneeded), young=len(unneeded) - len(old),
    )  # fmt: skip


def sweep(store: Store, grace_days: float, forget: Sequence[str] = ()) -> Garbage:
    """Remove it. No run can be at work meanwhile: the root's lock is held, and what is garbage is found again under it."""
    with store.lock():
        found = garbage(store, grace_days, forget)
        for run in forget:
            store.forget_run(run)
        for artifact, key, _ in found.artifacts:
            store.discard_entry(artifact.stage, key)
        for folder, _ in found.scratch:
            shutil.rmtree(folder, ignore_errors=True)
        for name in found.remote:
            store.forget_work(name)
        for name in found.encoded:
            forget_space(store.root, name)
    return found


def _roots(store: Store, forget: Sequence[str]) -> tuple[set[tuple[str, str]], set[str]]:
    """(stage, key) of every recorded run, and digests that records and all moves of pointers name."""
    runs = {str(run["run"]): run for run in store.list_runs()}
    if unknown := sorted(set(forget) - set(runs)):
        raise ConfigError(f"there is no run {unknown[0]!r} under {store.root}; t2i status lists them")
    kept = [run for name, run in runs.items() if name not in forget]
    entries = {(entry["name"], entry["key"]) for run in kept for entry in run.get("stages", []) if entry["key"]}
    digests = {str(run["current"]) for run in kept if "current" in run}
    for name in store.pointers():
        for each in moves(store, name):
            digests |= {each.artifact.digest, *(a.digest for group in each.beside.values() for a in group)}
    return entries, digests


def _finished(artifact: Artifact) -> datetime:
    """When it was made; one that does not say is taken as old."""
    said: Any = artifact.facts.get("finished")
    return datetime.fromisoformat(said) if said else datetime.fromtimestamp(0, UTC)


def _scratch(store: Store, grace_days: float) -> Iterator[tuple[str, int]]:
    """Working folders on this machine in which nothing was written for the grace period."""
    limit = time.time() - grace_days * 86_400
    for folder in sorted(store.scratch_root.iterdir()) if store.scratch_root.is_dir() else ():
        files = [path for path in folder.rglob("*") if path.is_file()]
        if max((path.stat().st_mtime for path in (folder, *files)), default=0.0) < limit:
            yield str(folder), sum(path.stat().st_size for path in files)


def gc_lines(found: Garbage, removed: bool) -> list[str]:
    """What a person reads."""
    lines = [f"{size / 1e6:>10.1f} MB  {artifact.stage}/{key[:12]}" for artifact, key, size in found.artifacts]
    lines += [
        f"{size / 1e6:>10.1f} MB  {Path(folder).name} (working folder of a dead run)" for folder, size in found.scratch
    ]
    lines += [f"{'':>13}  {name} (checkpoints of a dead run in the bucket)" for name in found.remote]
    lines += [f"{'':>13}  {name} (encodings that no run opened lately)" for name in found.encoded]
    verb = "removed" if removed else "can go; nothing was removed, add --delete"
    count = len(found.artifacts) + len(found.scratch) + len(found.remote) + len(found.encoded)
    lines.append(f"{found.num_bytes / 1e6:.1f} MB in {count} places {verb}; {found.kept} artifacts are needed, "
                 f"{found.young} are within the grace period")  # fmt: skip
    return lines

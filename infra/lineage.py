"""Lineage: the graph of artifacts, from their records alone. No data is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property

from infra.artifacts import Artifact
from infra.errors import ConfigError

SHORTEST_PREFIX = 6  # characters of a digest or key that may name an artifact


class Graph:
    """Artifacts by digest; a name that two stages' same bytes share means the one that finished last.

    As an input it means the last one before its reader: a filter that changed nothing has its own digest as its input.
    """

    def __init__(self, artifacts: Iterable[Artifact]) -> None:
        found = sorted(artifacts, key=_finished)
        self.by_digest: Mapping[str, Artifact] = {artifact.digest: artifact for artifact in found}
        self.by_key: Mapping[str, Artifact] = {key_of(artifact): artifact for artifact in found}
        self._made: dict[str, list[Artifact]] = {}
        for artifact in found:
            self._made.setdefault(artifact.digest, []).append(artifact)

    def inputs(self, artifact: Artifact) -> dict[str, Artifact]:
        """Role -> artifact of the inputs that are still in the store."""
        read = {role: self._read(digest, artifact) for role, digest in roles_of(artifact).items()}
        return {role: each for role, each in read.items() if each is not None}

    def _read(self, digest: str, reader: Artifact) -> Artifact | None:
        others = [each for each in self._made.get(digest, ()) if each.uri != reader.uri]
        before = [each for each in others if _finished(each) < _finished(reader)]
        usable = before or others
        return usable[-1] if usable else None

    def ancestors(self, artifact: Artifact) -> list[Artifact]:
        """Everything an artifact was made from, itself last, each after its own inputs."""
        reached, ahead = set[str](), [artifact]
        while ahead:
            each = ahead.pop()
            if each.uri not in reached:
                reached.add(each.uri)
                ahead += self.inputs(each).values()
        return [each for each in self.ordered if each.uri in reached]

    def descendants(self, digests: Iterable[str]) -> list[tuple[Artifact, dict[str, Artifact]]]:
        """What was made from any of the digests, directly or not, each with the affected inputs by role."""
        reached = set(digests)
        found: list[tuple[Artifact, dict[str, Artifact]]] = []
        for artifact in self.ordered:
            hit = {role: each for role, each in self.inputs(artifact).items() if each.digest in reached}
            if hit and artifact.digest not in reached:
                reached.add(artifact.digest)
                found.append((artifact, hit))
        return found

    @cached_property
    def ordered(self) -> list[Artifact]:
        """Every artifact after its inputs, depth first."""
        done: dict[str, Artifact] = {}
        entered = set[str]()
        ahead = [each for made in self._made.values() for each in made]
        while ahead:
            each = ahead.pop()
            if each.uri in entered:
                done.setdefault(each.uri, each)
                continue
            entered.add(each.uri)
            ahead += [each, *(one for one in self.inputs(each).values() if one.uri not in entered)]
        return list(done.values())

    def named(self, prefix: str) -> Artifact | None:
        """The artifact whose digest or key begins with `prefix`; an ambiguous prefix is refused."""
        if len(prefix) < SHORTEST_PREFIX or not set(prefix) <= set("0123456789abcdef"):
            return None
        hits = {
            a.digest: a for names in (self.by_digest, self.by_key) for n, a in names.items() if n.startswith(prefix)
        }
        if len(hits) > 1:
            listed = ", ".join(f"{each.stage} {digest[:12]}" for digest, each in sorted(hits.items()))
            raise ConfigError(f"{prefix} begins {len(hits)} digests ({listed}); give more of it")
        return next(iter(hits.values()), None)


def _finished(artifact: Artifact) -> str:
    return str(artifact.facts.get("finished", ""))


def roles_of(artifact: Artifact) -> dict[str, str]:
    """Role -> digest of the inputs, as recorded by the stage, or numbered where only the parents are known."""
    recorded = artifact.facts.get("inputs")
    if isinstance(recorded, dict):
        return {str(role): str(digest) for role, digest in recorded.items()}
    return {str(number): digest for number, digest in enumerate(artifact.parents)}


def key_of(artifact: Artifact) -> str:
    """The stage key of an artifact: the folder after its stage's in its address."""
    parts = artifact.uri.rstrip("/").split("/")
    place = max(number for number, part in enumerate(parts[:-1]) if part == artifact.stage)
    return parts[place + 1]

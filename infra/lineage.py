"""Lineage: the graph of artifacts, from their records alone. No data is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from graphlib import TopologicalSorter

from infra.artifacts import Artifact
from infra.errors import ConfigError

SHORTEST_PREFIX = 6  # characters of a digest or key that may name an artifact


class Graph:
    """Artifacts by digest; where two stages made the same bytes, the one that finished last stands for both."""

    def __init__(self, artifacts: Iterable[Artifact]) -> None:
        found = sorted(artifacts, key=lambda artifact: str(artifact.facts.get("finished", "")))
        self.by_digest: Mapping[str, Artifact] = {artifact.digest: artifact for artifact in found}
        self.by_key: Mapping[str, Artifact] = {key_of(artifact): artifact for artifact in found}

    def inputs(self, artifact: Artifact) -> dict[str, Artifact]:
        """Role -> artifact of the inputs that are still in the store."""
        roles = roles_of(artifact)
        return {role: self.by_digest[digest] for role, digest in roles.items() if digest in self.by_digest}

    def ancestors(self, artifact: Artifact) -> list[Artifact]:
        """Everything an artifact was made from, itself last, each after its own inputs."""
        reached, ahead = set[str](), [artifact]
        while ahead:
            each = ahead.pop()
            if each.digest not in reached:
                reached.add(each.digest)
                ahead += self.inputs(each).values()
        return [each for each in self.ordered if each.digest in reached]

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
        """Every artifact after its inputs."""
        inputs = {digest: [each.digest for each in self.inputs(a).values()] for digest, a in self.by_digest.items()}
        return [self.by_digest[digest] for digest in TopologicalSorter(inputs).static_order()]

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

"""What a run comes to: the object that `t2i run --json` ends with and `t2i report --json` prints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_curation.config import CURATION
from infra.artifacts import Artifact
from infra.errors import ArtifactCorrupted
from infra.storage import Store

PUBLIC = ("run", "root", "report", "wall_seconds", "outcome", "error", "stages", "funnel", "truth", "scores", "exports")


def public(record: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a run record that tools read."""
    return {name: record.get(name) for name in PUBLIC}


def summarise(store: Store, artifacts: Mapping[str, Artifact]) -> dict[str, Any]:
    """Funnel, truth, scores, exports and report, as far as the stages that make them are there."""
    report = _folder(store, artifacts.get("report"))
    exports = _folder(store, artifacts.get("export"))
    return {
        "report": None if report is None else str(report / "report.html"),
        "funnel": funnel(artifacts),
        "truth": next((a.facts["truth"] for a in reversed(list(artifacts.values())) if "truth" in a.facts), {}),
        "scores": _scores(store, artifacts),
        "exports": {} if exports is None else {p.name: str(p) for p in sorted(exports.iterdir()) if p.is_dir()},
    }


def funnel(artifacts: Mapping[str, Artifact]) -> dict[str, Any]:
    """Received, kept, errored and dropped by reason; every manifest carries all rows, so the last one has it all."""
    facts = [artifacts[name].facts for name in CURATION if name in artifacts and "received" in artifacts[name].facts]
    return {name: facts[-1].get(name) for name in ("received", "kept", "errored", "dropped")} if facts else {}


def _scores(store: Store, artifacts: Mapping[str, Artifact]) -> dict[str, Any]:
    """Stage -> metric -> value with interval; of the distances to held-out pictures where nothing else was asked."""
    for name, file in (("evaluate", "scores.json"), ("distribution", "distribution.json")):
        folder = _folder(store, artifacts.get(name))
        if folder is not None and (folder / file).exists():
            scores: dict[str, Any] = json.loads((folder / file).read_text())
            found: dict[str, Any] = scores.get("scores", scores)
            return found
    return {}


def _folder(store: Store, artifact: Artifact | None) -> Path | None:
    if artifact is None:
        return None
    try:
        return store.local(artifact)
    except ArtifactCorrupted:
        return None

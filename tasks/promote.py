"""Stage function that lets a candidate checkpoint through its gate; the flow then moves the pointer to it."""

from __future__ import annotations

import json
from typing import Any

from infra.config import Config
from infra.errors import GateFailed
from infra.stages import StageContext


class PromoteConfig(Config):
    """Nothing to set: the gates belong to `evaluate`."""


def promote(config: PromoteConfig, ctx: StageContext) -> dict[str, Any]:
    """Let the candidate through, or refuse it when its evaluation missed a gate."""
    candidate = ctx.parents["candidate"]
    missed = missed_gates(ctx.parents["scores"].facts)
    if missed:
        raise GateFailed(f"checkpoint {candidate.stage!r} is not promoted: {'; '.join(missed)}; the model in use stays")
    pointer = {"stage": candidate.stage, "digest": candidate.digest}
    (ctx.out / "promoted.json").write_text(json.dumps(pointer, sort_keys=True))
    return {"promoted": candidate.model_dump(mode="json")}


def missed_gates(facts: dict[str, Any]) -> list[str]:
    """The gates of an evaluation that were missed, in words."""
    return [
        f"{gate['stage']}.{gate['metric']}: {gate['reason']}" for gate in facts.get("gates", []) if not gate["passed"]
    ]

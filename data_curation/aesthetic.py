"""Aesthetic filter: a linear head on an embedding, of the kind LAION trained on CLIP (LAION-Aesthetics V1).

Scores of different heads are on different scales, so model, digest of the head and threshold stand beside every score.
Left out: a head of our own; one trained on the demo's drawings would mean nothing, so a head must be given.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from data_curation.filter_config import AestheticConfig
from data_curation.manifest import KEEP, drop, funnel, read_manifest, shards, write_manifest
from data_curation.semantic import embed_shard
from infra.errors import ConfigError

if TYPE_CHECKING:
    from infra.stages import StageContext


def filter_aesthetic(config: AestheticConfig, ctx: StageContext) -> dict[str, Any]:
    """Score every kept picture and drop those below the threshold (reason unaesthetic)."""
    rows = read_manifest(ctx.inputs["rows"])
    kept = {row["row_id"]: row for row in rows if row["decision"] == KEEP}
    head = Path(config.head.path).expanduser()
    if not head.is_file():
        raise ConfigError(f"data.aesthetic.head {head} does not exist; give a safetensors file with weight and bias")
    digest = hashlib.sha256(head.read_bytes()).hexdigest()[:12]
    items = [(path, set(kept), config.embedder) for path in shards(ctx.inputs["images"])]
    model = ""
    for name, found in ctx.fan_out(embed_shard, items):
        if not found:
            continue
        model = f"{name}, head {digest}"
        scores = aesthetic_score(np.stack([vector for _, vector in found]), head)
        for (row_id, _), score in zip(found, scores.tolist(), strict=True):
            row = kept[row_id]
            row["aesthetic"], row["aesthetic_model"], row["aesthetic_threshold"] = (
                round(score, 4),
                model,
                config.min_score,
            )
            if row["aesthetic"] < config.min_score:
                drop(row, "unaesthetic")
    write_manifest(rows, ctx.out)
    return funnel(rows, len(rows)) | {"aesthetic_model": model, "scored": len(kept)}


def aesthetic_score(features: NDArray[np.float32], head: Path) -> NDArray[np.float32]:
    """[N] of features [N, D]: a linear head (safetensors `weight` [1, D], `bias` [1]) on features of length 1."""
    try:
        held = load_file(head)
    except SafetensorError as error:
        raise ConfigError(f"aesthetic head {head} is no safetensors file ({error}); convert it") from error
    if missing := sorted({"weight", "bias"} - held.keys()):
        raise ConfigError(
            f"aesthetic head {head} has no {missing}, only {sorted(held)}; name its tensors weight and bias"
        )
    if held["weight"].shape[-1] != features.shape[1]:
        raise ConfigError(
            f"aesthetic head {head} reads {held['weight'].shape[-1]} features, the embedding has {features.shape[1]}; "
            "take the head made for this embedding"
        )
    scores: NDArray[np.float32] = features @ held["weight"].reshape(-1) + held["bias"].reshape(-1)[0]
    return scores

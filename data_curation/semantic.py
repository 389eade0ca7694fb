"""Semantic duplicates: pictures whose embeddings have a cosine above a threshold; the best covers its direct neighbours.

The search is exact: every vector against every later one, block by block. That is n^2 D / 2 multiplications: seconds for
10,000 pictures, hours of a core for a million. Left out: an approximate index, clusters (SemDeDup, arXiv 2303.09540).

Every row keeps its better neighbours and their cosines, so that `reconsider` can apply a higher threshold later.

Shapes: N pictures, D numbers.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data_curation.decode import open_picture
from data_curation.dedup import cover, worth
from data_curation.embedders import BATCH, embedder
from data_curation.filter_config import HubEmbedder, PackagedEmbedder, SemanticConfig
from data_curation.manifest import KEEP, drop, funnel, pictures, read_manifest, shards, write_manifest

if TYPE_CHECKING:
    from infra.stages import StageContext

BLOCK = 1_024
DIGITS = 4  # of a cosine; the rest depends on the order of additions
Found = tuple[str, list[tuple[str, NDArray[np.float32]]]]  # name of the model, (row_id, vector)
Task = tuple[Path, set[str], PackagedEmbedder | HubEmbedder]


def semantic_dedup(config: SemanticConfig, ctx: StageContext) -> dict[str, Any]:
    """Drop every kept row that means the same as a better one (reason semantic_duplicate)."""
    rows = read_manifest(ctx.inputs["rows"])
    kept = sorted((row for row in rows if row["decision"] == KEEP), key=worth)
    wanted = {row["row_id"] for row in kept}
    items = [(path, wanted, config.embedder) for path in shards(ctx.inputs["images"])]
    parts: list[Found] = ctx.fan_out(embed_shard, items)
    names = {name for name, found in parts if found}
    assert len(names) <= 1, names
    vectors = {row_id: vector for _, found in parts for row_id, vector in found}
    i, j, cosine = similar_pairs(
        np.stack([vectors[row["row_id"]] for row in kept]) if kept else np.empty((0, 1), np.float32), config.min_cosine
    )
    for row in kept:
        row["semantic_model"], row["semantic_threshold"] = next(iter(names)), config.min_cosine
    for better, worse, value in zip(i.tolist(), j.tolist(), cosine.tolist(), strict=True):
        kept[worse].setdefault("semantic_near", []).append(kept[better]["row_id"])
        kept[worse].setdefault("semantic_cosines", []).append(value)
    for place, keeper, distance in cover(i, j, 1 - cosine):
        drop(kept[place], "semantic_duplicate")
        kept[place]["keeper_id"], kept[place]["semantic_score"] = kept[keeper]["row_id"], round(1 - distance, DIGITS)
    write_manifest(rows, ctx.out)
    return funnel(rows, len(rows)) | {"semantic_model": next(iter(names), ""), "scored": len(kept), "pairs": len(i)}


def embed_shard(item: Task) -> Found:
    """Model and (row_id, vector) of a shard's wanted pictures, decoded a few at a time."""
    shard, wanted, config = item
    name, found, stored = "", list[tuple[str, NDArray[np.float32]]](), pictures(shard, wanted)
    while part := [(row_id, open_picture(data)) for row_id, data in islice(stored, BATCH)]:
        model = embedder(config)
        vectors = model([picture for _, picture in part])
        name, found = model.name, [*found, *zip([row_id for row_id, _ in part], vectors, strict=True)]
    return name, found


def similar_pairs(
    vectors: NDArray[np.float32], min_cosine: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Every pair i < j of unit vectors [N, D] whose cosine, rounded, is at least `min_cosine`."""
    none: tuple[NDArray[Any], ...] = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float64)
    parts = [none]
    for first in range(0, len(vectors), BLOCK):
        for second in range(first, len(vectors), BLOCK):
            product = vectors[first : first + BLOCK] @ vectors[second : second + BLOCK].T
            cosine = np.round(product.astype(np.float64), DIGITS)
            i, j = np.nonzero(cosine >= min_cosine)
            later = i + first < j + second
            parts.append((i[later] + first, j[later] + second, cosine[i[later], j[later]]))
    columns: list[NDArray[Any]] = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return columns[0], columns[1], columns[2]

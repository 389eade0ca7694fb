"""Duplicates: the same bytes; then perceptual hashes (imagehash phash) nominate pairs and registration decides.

Of linked pictures the best is kept and covers its direct neighbours only: a chain of small changes never becomes one
big group. Every dropped row names its keeper and their distance.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data_curation.copies import confirmed
from data_curation.decode import open_picture
from data_curation.filter_config import DedupConfig
from data_curation.hamming import near_pairs
from data_curation.hashing import phash
from data_curation.known import (
    MAX_LOG_ASPECT,
    ROLE,
    drop_known_bytes,
    drop_known_copies,
    hash_name,
    read_known,
    write_signatures,
)
from data_curation.manifest import KEEP, Row, drop, funnel, pictures, read_manifest, shards, write_manifest
from data_curation.registration import thumbnail

if TYPE_CHECKING:
    from infra.stages import StageContext

Indices = NDArray[np.int64]


def deduplicate(config: DedupConfig, ctx: StageContext) -> dict[str, Any]:
    """Drop every copy of a better row; with an input `known`, first every copy of a row that was kept before."""
    rows = read_manifest(ctx.inputs["rows"])
    known = read_known(ctx.inputs[ROLE], ctx.parents[ROLE].digest) if ROLE in ctx.inputs else None
    if known is not None:
        drop_known_bytes(_kept(rows), known)
    drop_exact(_kept(rows))
    wanted = {row["row_id"]: row for row in _kept(rows)}
    items = [(path, set(wanted), config.hash_size) for path in shards(ctx.inputs["rows"])]
    thumbnails: dict[str, NDArray[np.uint8]] = {}
    for row_id, value, small in (found for part in ctx.fan_out(sketch_shard, items) for found in part):
        wanted[row_id]["phash"] = value.tobytes().hex()
        thumbnails[row_id] = small
    facts = {} if known is None else drop_known_copies(_kept(rows), thumbnails, known, config)
    if known is not None:
        facts["known_dropped"] = sum(row.get("keeper_origin") is not None for row in rows)
    kept = sorted(_kept(rows), key=worth)
    i, j, distance = near_pairs(_hashes(kept), config.max_distance)
    nominated = len(i)
    i, j, distance = _similar_shape(kept, i, j, distance)
    copies = confirmed([row["row_id"] for row in kept], thumbnails, i, j, distance, config)
    drop_covered(kept, i[copies], j[copies], distance[copies])
    write_manifest(rows, ctx.out)
    write_signatures(known, sorted(_kept(rows), key=lambda row: str(row["row_id"])), thumbnails, config, ctx.out)
    return (
        funnel(rows, len(rows))
        | {"hash": hash_name(config), "pairs_nominated": nominated, "pairs_confirmed": int(copies.sum())}
        | facts
    )


def _kept(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["decision"] == KEEP]


def _hashes(rows: list[Row]) -> NDArray[np.uint8]:
    found = [np.frombuffer(bytes.fromhex(row["phash"]), np.uint8) for row in rows]
    return np.stack(found) if found else np.empty((0, 8), np.uint8)


def drop_exact(rows: list[Row]) -> None:
    """Drop rows with the bytes of an earlier row."""
    first: dict[str, str] = {}
    for row in rows:
        keeper = first.setdefault(row["sha256_raw"], row["row_id"])
        if keeper != row["row_id"]:
            drop(row, "exact_duplicate")
            row["keeper_id"], row["dup_distance"] = keeper, 0


def drop_covered(rows: list[Row], i: Indices, j: Indices, distance: Indices) -> None:
    """Rows come best first; a row is dropped for its nearest kept neighbour among the better ones."""
    for place, keeper, nearest in cover(i, j, distance):
        drop(rows[place], "near_duplicate")
        rows[place]["keeper_id"], rows[place]["dup_distance"] = rows[keeper]["row_id"], int(nearest)


def cover(i: Indices, j: Indices, distance: NDArray[Any]) -> list[tuple[int, int, float]]:
    """Greedy cover of places that come best first, from pairs i < j: (covered place, its nearest keeper, distance)."""
    better: dict[int, list[tuple[float, int]]] = {}
    for a, b, d in zip(i.tolist(), j.tolist(), distance.tolist(), strict=True):
        better.setdefault(b, []).append((d, a))
    found: dict[int, tuple[int, int, float]] = {}
    for place in sorted(better):
        keepers = [(d, a) for d, a in better[place] if a not in found]
        if keepers:
            nearest, keeper = min(keepers)
            found[place] = place, keeper, nearest
    return list(found.values())


def sketch_shard(item: tuple[Path, set[str], int]) -> list[tuple[str, NDArray[np.uint8], NDArray[np.uint8]]]:
    """(row_id, packed phash, thumbnail) of a shard's wanted pictures."""
    shard, wanted, hash_size = item
    return [
        (row_id, phash(data, hash_size), thumbnail(open_picture(data)))
        for row_id, data in pictures(shard, wanted)
    ]  # fmt: skip


def worth(row: Row) -> tuple[int, int, str]:
    """Sorts the row to keep first: more pixels, then more bytes, then the earlier one."""
    return -row["width"] * row["height"], -row["num_bytes"], row["row_id"]


def _similar_shape(rows: list[Row], i: Indices, j: Indices, distance: Indices) -> tuple[Indices, Indices, Indices]:
    aspect = np.log(np.array([row["width"] / row["height"] for row in rows]))
    near = np.abs(aspect[i] - aspect[j]) < MAX_LOG_ASPECT
    return i[near], j[near], distance[near]

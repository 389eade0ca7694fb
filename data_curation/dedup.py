"""Duplicates: the same bytes; then perceptual hashes (imagehash phash) nominate pairs and registration decides.

Of linked pictures the best is kept and covers its direct neighbours only: a chain of small changes never becomes one
big group. Every dropped row names its keeper and their distance.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data_curation.config import DedupConfig
from data_curation.decode import open_picture
from data_curation.hamming import near_pairs
from data_curation.hashing import VERSION, phash
from data_curation.known import ROLE, drop_known
from data_curation.manifest import KEEP, Row, drop, funnel, pictures, read_manifest, shards, write_manifest
from data_curation.registration import MAX_LOG_ASPECT, register, thumbnail

if TYPE_CHECKING:
    from infra.stages import StageContext

MAX_MEAN_TINT = 20.0  # grey levels; pictures whose mean colours differ more are not worth registering
Indices = NDArray[np.int64]


def deduplicate(config: DedupConfig, ctx: StageContext) -> dict[str, Any]:
    """Drop every copy of a better row."""
    rows = read_manifest(ctx.inputs["rows"])
    paths = shards(ctx.inputs["rows"])
    drop_exact([row for row in rows if row["decision"] == KEEP])
    kept = sorted((row for row in rows if row["decision"] == KEEP), key=_worth)
    place = {row["row_id"]: i for i, row in enumerate(kept)}
    items = [(path, set(place), config.hash_size) for path in paths]
    found = dict(pair for part in ctx.fan_out(hash_shard, items) for pair in part)
    hashes = np.stack([found[row["row_id"]] for row in kept]) if kept else np.empty((0, 8), np.uint8)
    for row, value in zip(kept, hashes, strict=True):
        row["phash"] = value.tobytes().hex()
    known = drop_known(kept, hashes, ctx.inputs[ROLE], config.sure_distance) if ROLE in ctx.inputs else 0
    left = [place for place, row in enumerate(kept) if row["decision"] == KEEP]
    kept, hashes = [kept[place] for place in left], hashes[left]
    i, j, distance = near_pairs(hashes, config.max_distance)
    nominated = len(i)
    i, j, distance = _similar_shape(kept, i, j, distance)
    wanted = {kept[k]["row_id"] for k in {*i.tolist(), *j.tolist()}}
    thumbnails = dict(
        pair for part in ctx.fan_out(thumbnail_shard, [(path, wanted) for path in paths]) for pair in part
    )
    copies = confirmed([row["row_id"] for row in kept], thumbnails, i, j, distance, config)
    drop_covered(kept, i[copies], j[copies], distance[copies])
    write_manifest(rows, ctx.out)
    return funnel(rows, len(rows)) | {
        "hash": f"{VERSION}, {config.hash_size**2} bits",
        "pairs_nominated": nominated,
        "pairs_confirmed": int(copies.sum()),
        "known_before": known,
    }


def drop_exact(rows: list[Row]) -> None:
    """Drop rows with the bytes of an earlier row."""
    first: dict[str, str] = {}
    for row in rows:
        keeper = first.setdefault(row["sha256_raw"], row["row_id"])
        if keeper != row["row_id"]:
            drop(row, "exact_duplicate")
            row["keeper_id"], row["dup_distance"] = keeper, 0


def drop_covered(rows: list[Row], i: Indices, j: Indices, distance: Indices) -> None:
    """Greedy cover: rows come best first; a row is dropped for its nearest kept neighbour among the better ones."""
    better: dict[int, list[tuple[int, int]]] = {}
    for a, b, d in zip(i.tolist(), j.tolist(), distance.tolist(), strict=True):
        better.setdefault(b, []).append((d, a))
    for place in sorted(better):
        keepers = [(d, a) for d, a in better[place] if rows[a]["decision"] == KEEP]
        if keepers:
            nearest, keeper = min(keepers)
            drop(rows[place], "near_duplicate")
            rows[place]["keeper_id"], rows[place]["dup_distance"] = rows[keeper]["row_id"], nearest


def hash_shard(item: tuple[Path, set[str], int]) -> list[tuple[str, NDArray[np.uint8]]]:
    """(row_id, packed phash) of a shard's wanted pictures."""
    shard, wanted, hash_size = item
    return [(row_id, phash(data, hash_size)) for row_id, data in pictures(shard, wanted)]


def thumbnail_shard(item: tuple[Path, set[str]]) -> list[tuple[str, NDArray[np.uint8]]]:
    """(row_id, thumbnail) of a shard's wanted pictures."""
    return [(row_id, thumbnail(open_picture(data))) for row_id, data in pictures(*item)]


def _worth(row: Row) -> tuple[int, int, str]:
    """Sorts the row to keep first: more pixels, then more bytes, then the earlier one."""
    return -row["width"] * row["height"], -row["num_bytes"], row["row_id"]


def _similar_shape(rows: list[Row], i: Indices, j: Indices, distance: Indices) -> tuple[Indices, Indices, Indices]:
    aspect = np.log(np.array([row["width"] / row["height"] for row in rows]))
    near = np.abs(aspect[i] - aspect[j]) < MAX_LOG_ASPECT
    return i[near], j[near], distance[near]


def confirmed(
    row_ids: list[str], thumbnails: dict[str, NDArray[np.uint8]], i: Indices, j: Indices, distance: Indices,
    config: DedupConfig,
) -> NDArray[np.bool_]:  # fmt: skip
    """Which nominated pairs are copies: equal once registered, or nearly so at a very small hash distance."""
    copies = np.zeros(len(i), bool)
    if not len(i):
        return copies
    first, second = (np.stack([thumbnails[row_ids[k]] for k in side]) for side in (i, j))
    a, b = first.mean(axis=(1, 2)), second.mean(axis=(1, 2))
    gain = (a * b).sum(axis=1) / np.maximum((b * b).sum(axis=1), 1)
    rest = np.flatnonzero(np.abs(a - gain[:, None] * b).max(axis=1) < MAX_MEAN_TINT)
    found = register(first[rest], second[rest])
    limit = config.max_relative * (1 - 0.5 * distance[rest] / max(config.max_distance, 1))
    equal = (found.relative / limit) ** 2 + (found.tint / config.max_tint) ** 2 < 1
    sure = (found.residual < config.sure_residual) & (found.tint < config.sure_tint)
    copies[rest] = equal | (sure & (distance[rest] <= config.sure_distance))
    return copies

"""What earlier nights have seen: their manifest is the watermark. A URL is asked for once, a picture is kept once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_curation.config import RememberConfig
from data_curation.hamming import near_pairs
from data_curation.manifest import KEEP, MANIFEST, Row, drop, read_manifest, write_manifest

if TYPE_CHECKING:
    from infra.stages import StageContext

ROLE = "known"


def remember(config: RememberConfig, ctx: StageContext) -> dict[str, Any]:
    """The manifest of everything seen up to and including tonight."""
    before, tonight = read_manifest(ctx.inputs[ROLE]), read_manifest(ctx.inputs["manifest"])
    urls = {row["url"] for row in tonight}
    rows = [*(row for row in before if row["url"] not in urls), *tonight]
    write_manifest(rows, ctx.out)
    return {"rows": len(rows), "new": len(tonight), "kept": sum(row["decision"] == KEEP for row in rows)}


def seen_urls(ctx: StageContext) -> frozenset[str]:
    """URLs that were taken before; none without the role `known`."""
    if ROLE not in ctx.inputs:
        return frozenset()
    return frozenset(pq.read_table(ctx.inputs[ROLE] / MANIFEST, columns=["url"])["url"].to_pylist())


def drop_known(rows: Sequence[Row], hashes: NDArray[np.uint8], folder: Path, max_distance: int) -> int:
    """Drop rows that an earlier night kept: the same bytes, or a perceptual hash within `max_distance` bits; how many."""
    kept = [row for row in read_manifest(folder) if row["decision"] == KEEP]
    same = {row["sha256_raw"]: row["row_id"] for row in kept}
    hashed = [row for row in kept if row["phash"] and len(row["phash"]) == 2 * hashes.shape[1]]
    nearest: dict[int, tuple[int, str]] = {}
    if len(rows) and hashed:
        old = np.stack([np.frombuffer(bytes.fromhex(row["phash"]), np.uint8) for row in hashed])
        for a, b, d in zip(
            *(part.tolist() for part in near_pairs(np.concatenate([old, hashes]), max_distance)), strict=True
        ):
            first, second = min(a, b), max(a, b)
            if first < len(old) <= second:
                found = (d, hashed[first]["row_id"])
                nearest[second - len(old)] = min(nearest.get(second - len(old), found), found)
    count = 0
    for place, row in enumerate(rows):
        keeper = (0, same[row["sha256_raw"]]) if row["sha256_raw"] in same else nearest.get(place)
        if keeper is not None:
            drop(row, "known_before")
            row["dup_distance"], row["keeper_id"] = keeper
            count += 1
    return count

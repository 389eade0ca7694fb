"""Buckets: the nearest aspect ratio per training resolution, never enlarged; and the split. The last filter.

Buckets are those of a few ratios, or (`every`) all shapes on the grid with about the resolution's pixels, of which NovelAI's
buckets (2022) are a part. Left out: a picture in two buckets of one resolution; merging buckets that stay nearly empty.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from data_curation.bucket_facts import Bucket, crop_share, resolution_facts
from data_curation.config import BucketsConfig, EveryShape, ResolutionConfig
from data_curation.known import pass_on
from data_curation.manifest import KEEP, Row, drop, funnel, read_manifest, write_manifest
from data_curation.truth import score_truth
from infra.errors import ConfigError

if TYPE_CHECKING:
    from infra.stages import StageContext

SQUARE = 1.25  # pictures no longer than this train in a square-only resolution


def assign_buckets(config: BucketsConfig, ctx: StageContext) -> dict[str, Any]:
    """Give every kept row its buckets and split; with the demo's truth at hand, score the whole curation."""
    rows = read_manifest(ctx.inputs["rows"])
    sizes = {resolution: bucket_sizes(resolution, config) for resolution in config.resolutions}
    for row in rows:
        if row["decision"] == KEEP:
            _assign(row, config, sizes)
    write_manifest(rows, ctx.out)
    kept = [row for row in rows if row["decision"] == KEEP]
    if "signatures" in ctx.inputs:
        pass_on(ctx.inputs["signatures"], {row["row_id"] for row in kept}, ctx.out)
    facts = funnel(rows, len(rows)) | {
        "buckets": dict(sorted(Counter(name for row in kept for name in row["buckets"]).items())),
        "resolutions": resolution_facts(kept, {r.side: len(each) for r, each in sizes.items()}),
        "splits": dict(sorted(Counter(row["split"] for row in kept).items())),
        "mean_crop_share": round(sum(row["crop_share"] for row in kept) / max(len(kept), 1), 4),
    }
    if "truth" in ctx.inputs and (ctx.inputs["truth"] / "truth.parquet").exists():
        facts["truth"] = score_truth(rows, ctx.inputs["truth"])
    return facts


def bucket_sizes(resolution: ResolutionConfig, config: BucketsConfig) -> list[Bucket]:
    """Buckets of a resolution: about side x side px for every ratio, both sides multiples of the patch."""
    if resolution.aspects == "square":
        return [(_round(resolution.side, config.patch), _round(resolution.side, config.patch))]
    if config.every is not None:
        return every_shape(resolution.side, config.patch, config.every)
    sizes = {
        (_round(resolution.side * math.sqrt(r), config.patch), _round(resolution.side / math.sqrt(r), config.patch))
        for r in config.ratios
    }
    return sorted(sizes)


def every_shape(side: int, patch: int, limits: EveryShape) -> list[Bucket]:
    """All (width, height) on the grid within the limits; of several with one ratio that nearest to side x side px."""
    budget, best = side * side, dict[Fraction, Bucket]()
    longest = int(side * math.sqrt((1 + limits.tolerance) * max(limits.max_ratio, 1 / limits.min_ratio)))
    for width in range(patch, longest + patch, patch):
        low = max(patch, math.ceil((1 - limits.tolerance) * budget / width / patch) * patch)
        for height in range(low, int((1 + limits.tolerance) * budget / width) + 1, patch):
            ratio, size = Fraction(width, height), (width, height)
            if limits.min_ratio <= ratio <= limits.max_ratio:
                best[ratio] = min(best.get(ratio, size), size, key=lambda s: (abs(s[0] * s[1] - budget), s))
    if not best:
        raise ConfigError(
            f"no bucket of resolution {side} has sides that are multiples of patch={patch} and within "
            f"{limits.tolerance:.1%} of {budget} px; raise data.buckets.every.tolerance, or take another side"
        )
    return sorted(best.values())


def nearest_bucket(width: int, height: int, sizes: list[Bucket]) -> Bucket:
    """The bucket with the nearest log ratio."""
    return min(sizes, key=lambda size: (abs(math.log(width / height) - math.log(size[0] / size[1])), size))


def _assign(row: Row, config: BucketsConfig, sizes: dict[ResolutionConfig, list[Bucket]]) -> None:
    width, height = row["width"], row["height"]
    names: list[str] = []
    problems: list[str] = []
    for resolution in sorted(config.resolutions, key=lambda r: r.side):
        if resolution.aspects == "square" and max(width, height) > SQUARE * min(width, height):
            continue
        bucket = nearest_bucket(width, height, sizes[resolution])
        cut = crop_share(width, height, bucket)
        if not config.upscale and (width < bucket[0] or height < bucket[1]):
            problems.append("too_small_for_bucket")
        elif cut > config.max_crop:
            problems.append("crop_too_large")
        else:
            names.append(f"{resolution.side}:{bucket[0]}x{bucket[1]}")
            row["bucket_w"], row["bucket_h"], row["crop_share"] = bucket[0], bucket[1], round(cut, 4)
    if not names:
        drop(row, *(problems or ["no_bucket"]))
        return
    row["buckets"] = names
    share = int.from_bytes(hashlib.sha256(row["row_id"].encode()).digest()[:8], "big") / 2**64
    row["split"] = "validation" if share < config.validation_share else "train"


def _round(value: float, patch: int) -> int:
    return max(patch, round(value / patch) * patch)

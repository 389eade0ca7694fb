"""What bucketing costs, per resolution: pixels cut away, pixels lost to downscaling, rows that fill no batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_curation.manifest import Row

BATCHES = (16, 64, 256)  # batch sizes for which the rows that fill no batch are counted
DIGITS = 4
Bucket = tuple[int, int]  # width, height


def crop_share(width: int, height: int, bucket: Bucket) -> float:
    """Share of the picture that is cut away to get the bucket's shape."""
    scale = min(width / bucket[0], height / bucket[1])
    return 1 - bucket[0] * bucket[1] * scale * scale / (width * height)


def parse_bucket(name: str) -> tuple[int, Bucket]:
    """Resolution and (width, height) of a bucket's name, such as 40:48x32."""
    side, size = name.split(":")
    width, height = size.split("x")
    return int(side), (int(width), int(height))


def resolution_facts(kept: Sequence[Row], possible: Mapping[int, int]) -> dict[str, dict[str, Any]]:
    """Side -> costs of it, from kept rows with `width`, `height`, `buckets` and `split`; `possible` counts its buckets.

    Shares are means over pictures, `cropped_p95` is their 95th percentile. `downscaled` is the share of pixels lost between
    cut and bucket. `left_over` is, per batch size, the share of training rows that fill no batch of their bucket: a loader that
    drops last batches would lose them; ours fills these batches up with rows of the same bucket, and loses none.
    """
    return {str(side): _facts(_placed(kept, side), count) for side, count in sorted(possible.items())}


def _placed(kept: Sequence[Row], side: int) -> list[tuple[Row, Bucket]]:
    named = ((row, parse_bucket(name)) for row in kept for name in row["buckets"])
    return [(row, bucket) for row, (own, bucket) in named if own == side]


def _facts(placed: Sequence[tuple[Row, Bucket]], possible: int) -> dict[str, Any]:
    facts: dict[str, Any] = {"pictures": len(placed), "buckets": len({b for _, b in placed}), "possible": possible}
    if not placed:
        return facts
    pixels = np.array([row["width"] * row["height"] for row, _ in placed], np.float64)
    cropped = np.array([crop_share(row["width"], row["height"], bucket) for row, bucket in placed])
    downscaled = 1 - np.array([w * h for _, (w, h) in placed]) / (pixels * (1 - cropped))
    rows = Counter(bucket for row, bucket in placed if row["split"] == "train")
    left = {str(size): sum(n % size for n in rows.values()) / max(rows.total(), 1) for size in BATCHES}
    return facts | {
        "cropped": round(float(cropped.mean()), DIGITS),
        "cropped_p95": round(float(np.quantile(cropped, 0.95)), DIGITS),
        "downscaled": round(float(downscaled.mean()), DIGITS),
        "left_over": {size: round(share, DIGITS) for size, share in left.items()},
    }

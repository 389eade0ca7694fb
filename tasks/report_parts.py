"""Pieces of the report that are pictures: loss curves as inline SVG, thumbnails, galleries of rows curation refused."""

from __future__ import annotations

import base64
import io
import json
import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from data_curation.manifest import pictures, read_manifest, shards
from infra.stages import StageContext
from tasks.config import ReportConfig

WIDTH, HEIGHT = 320, 120


@dataclass(frozen=True)
class Example:
    """A refused row: what it claimed to be, how it looks, and the row it copies."""

    caption: str
    url: str
    picture: str | None = None
    keeper: str | None = None
    note: str = ""


@dataclass(frozen=True)
class Refused:
    """All rows refused for one reason, a few of them as examples."""

    reason: str
    decision: str
    count: int
    examples: list[Example] = field(default_factory=list)


@dataclass(frozen=True)
class Curve:
    """A log-scaled curve over steps as SVG points, with its ends in numbers."""

    name: str
    points: str
    first: float
    last: float
    low: float
    high: float
    steps: int


def load_metrics(path: Path) -> list[dict[str, float]]:
    """Rows of metrics.jsonl, none where a stage wrote none."""
    return [json.loads(line) for line in path.read_text().splitlines() if line] if path.exists() else []


def curve(
    name: str, rows: list[dict[str, float]], metric: str = "loss", beside: list[dict[str, float]] | None = None
) -> Curve | None:
    """The curve of one metric, on axes that also hold the rows `beside` it; None when it has no positive value."""
    values, others = _positive(rows, metric), _positive(beside or [], metric)
    if not values:
        return None
    logs = [math.log(value) for _, value in (*values, *others)]
    low, high, end = min(logs), max(logs), max(step for step, _ in (*values, *others))
    spread = (high - low) or 1.0
    points = " ".join(
        f"{WIDTH * step / end:.1f},{HEIGHT * (1 - (math.log(value) - low) / spread):.1f}" for step, value in values
    )
    return Curve(name, points, values[0][1], values[-1][1], math.exp(low), math.exp(high), int(end))


def _positive(rows: list[dict[str, float]], metric: str) -> list[tuple[float, float]]:
    return [(row["step"], row[metric]) for row in rows if row.get(metric, 0) > 0]


def data_uri(data: bytes) -> str:
    """The bytes of a PNG file as a data URI."""
    return "data:image/png;base64," + base64.b64encode(data).decode()


def thumbnail(stored: bytes, side: int) -> str:
    """A stored picture as a small PNG data URI."""
    with Image.open(io.BytesIO(stored)) as opened:
        image = opened.convert("RGB")
    image.thumbnail((side, side))
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return data_uri(out.getvalue())


def galleries(config: ReportConfig, ctx: StageContext) -> list[Refused]:
    """Every reason for which rows were dropped or failed, the most frequent first, with a few of the rows."""
    if "buckets" not in ctx.inputs or "download" not in ctx.inputs:
        return []
    refused = [row for row in read_manifest(ctx.inputs["buckets"]) if row["decision"] != "keep"]
    counts = Counter((str(row["reasons"][0]), str(row["decision"])) for row in refused)
    chosen = defaultdict[tuple[str, str], list[dict[str, Any]]](list)
    for row in refused:
        group = chosen[(str(row["reasons"][0]), str(row["decision"]))]
        if len(group) < config.dropped_examples:
            group.append(row)
    rows = [row for group in chosen.values() for row in group]
    wanted = {str(row[name]) for row in rows for name in ("row_id", "keeper_id") if row.get(name)}
    stored = {key: data for shard in shards(ctx.inputs["download"]) for key, data in pictures(shard, wanted)}
    shown = {key: thumbnail(data, config.thumbnail_side) for key, data in stored.items()}
    return [
        Refused(reason, decision, count, [_example(row, shown) for row in chosen[(reason, decision)]])
        for (reason, decision), count in counts.most_common()
    ]


def _example(row: dict[str, Any], shown: dict[str, str]) -> Example:
    keeper = row.get("keeper_id")
    distance = row.get("dup_distance")
    note = f"distance {distance}" if keeper and distance is not None else ""
    return Example(
        caption=str(row["caption_short"] or ""), url=str(row["url"]), picture=shown.get(str(row["row_id"])),
        keeper=shown.get(str(keeper)) if keeper else None, note=note,
    )  # fmt: skip

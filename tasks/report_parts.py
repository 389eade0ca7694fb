"""Pieces of the report: loss curves as inline SVG, galleries of rows that curation refused."""

from __future__ import annotations

import base64
import io
import json
import math
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from PIL import Image

from data_curation.manifest import pictures, read_manifest, shards
from infra.stages import StageContext
from tasks.config import ReportConfig

WIDTH, HEIGHT = 320, 120


def load_metrics(path: Path) -> list[dict[str, float]]:
    """Rows of metrics.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines() if line] if path.exists() else []


def curve(rows: list[dict[str, float]]) -> dict[str, Any]:
    """Points of a log-scaled loss curve for an SVG polyline, with its end values; empty without rows."""
    values = [(row["step"], row["loss"]) for row in rows if row.get("loss", 0) > 0]
    if not values:
        return {"points": "", "first": None, "last": None}
    logs = [math.log(loss) for _, loss in values]
    low, high, end = min(logs), max(logs), values[-1][0]
    points = [
        f"{WIDTH * step / end:.1f},{HEIGHT * (1 - (value - low) / ((high - low) or 1)):.1f}"
        for (step, _), value in zip(values, logs, strict=True)
    ]
    return {"points": " ".join(points), "first": values[0][1], "last": values[-1][1], "steps": int(end)}


def gallery(config: ReportConfig, ctx: StageContext) -> list[tuple[str, int, list[tuple[str, str]]]]:
    """(reason, rows, [(caption, thumbnail data URI)]) of everything that was dropped or failed."""
    if "buckets" not in ctx.inputs or "download" not in ctx.inputs:
        return []
    refused = [row for row in read_manifest(ctx.inputs["buckets"]) if row["decision"] != "keep"]
    counts = Counter(row["reasons"][0] for row in refused)
    wanted = defaultdict[str, list[dict[str, Any]]](list)
    for row in refused:
        if len(wanted[row["reasons"][0]]) < config.dropped_examples:
            wanted[row["reasons"][0]].append(row)
    ids = {str(row["row_id"]) for rows in wanted.values() for row in rows}
    shown = {key: image for shard in shards(ctx.inputs["download"]) for key, image in pictures(shard, ids)}
    return [
        (
            reason,
            number,
            [
                (str(row["caption_short"]), thumbnail(shown[row["row_id"]], config.thumbnail_side))
                for row in wanted[reason]
                if row["row_id"] in shown
            ],
        )
        for reason, number in counts.most_common()
    ]


def thumbnail(stored: bytes, side: int) -> str:
    """A stored picture as a small PNG data URI."""
    image = Image.open(io.BytesIO(stored)).convert("RGB")
    image.thumbnail((side, side))
    out = io.BytesIO()
    image.save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()

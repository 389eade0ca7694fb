"""Pieces of the report that are pictures: loss curves as inline SVG, thumbnails."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from infra.artifacts import Artifact
from models.pretraining.densities import bars

WIDTH, HEIGHT = 320, 120


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


def fitted(image: Image.Image, side: int) -> Image.Image:
    """The picture inside a white square; small ones are enlarged by whole pixels, so that nothing is smoothed over."""
    way = Image.Resampling.NEAREST if max(image.size) <= side else Image.Resampling.LANCZOS
    return ImageOps.pad(image.convert("RGB"), (side, side), way, color="white")


def shown(stored: bytes, side: int) -> str:
    """A PNG file as it is where it is small, else as a thumbnail, so that large models leave room on the page."""
    with Image.open(io.BytesIO(stored)) as opened:
        large = max(opened.size) > side
    return thumbnail(stored, side) if large else data_uri(stored)


def times_rows(parents: Mapping[str, Artifact]) -> list[tuple[str, str]]:
    """(stage, histogram of its training times, data to noise) of every stage that drew times."""
    shares = {role: artifact.facts.get("times") for role, artifact in parents.items()}
    return [(role, bars(found)) for role, found in shares.items() if found]

"""Quality: technical checks of every picture, and captions that the pictures contradict; every check has its reason."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data_curation.agreement import caption_fit, probe_thumbnail
from data_curation.decode import open_picture
from data_curation.filter_config import QualityConfig, QualityThresholds
from data_curation.manifest import KEEP, Row, drop, funnel, pictures, read_manifest, shards, write_manifest
from data_curation.quality_scores import scores

if TYPE_CHECKING:
    from infra.stages import StageContext

log = logging.getLogger(__name__)


def filter_quality(config: QualityConfig, ctx: StageContext) -> dict[str, Any]:
    """Drop pictures below the thresholds, then rows whose caption is about another picture."""
    rows = read_manifest(ctx.inputs["rows"])
    kept = {row["row_id"]: row for row in rows if row["decision"] == KEEP}
    thumbnails: dict[str, NDArray[np.uint8]] = {}
    items = [(path, set(kept), config.measures_more) for path in shards(ctx.inputs["images"])]
    for part in ctx.fan_out(measure_shard, items):
        for row_id, found, thumbnail in part:
            kept[row_id].update(found)
            thumbnails[row_id] = thumbnail
    for row in kept.values():
        if reasons := technical_reasons(row, config):
            drop(row, *reasons)
    checked = _check_captions([row for row in kept.values() if row["decision"] == KEEP], thumbnails, config)
    write_manifest(rows, ctx.out)
    return funnel(rows, len(rows)) | checked


def measure_shard(item: tuple[Path, set[str], bool]) -> list[tuple[str, Row, NDArray[np.uint8]]]:
    """(row_id, scores, probe thumbnail) of a shard's wanted pictures."""
    shard, wanted, more = item
    return [
        (row_id, scores(data, more), probe_thumbnail(open_picture(data)))
        for row_id, data in pictures(shard, wanted)
    ]  # fmt: skip


def technical_reasons(row: Row, config: QualityThresholds) -> list[str]:
    """Every check that the picture fails, the plainest first."""
    short, long = sorted((row["width"], row["height"]))
    checks = {
        "too_small": short < config.min_side,
        "odd_aspect": long > config.max_aspect * short,
        "blurred": row["blur"] > config.max_blur,
        "over_compressed": row["jpeg_quality"] is not None and row["jpeg_quality"] < config.min_jpeg_quality,
        "no_content": row["contrast"] < config.min_contrast,
    }
    further = {"bordered": ("border", config.max_border), "badly_exposed": ("clipped", config.max_clipped),
               "text_overlay": ("overlay", config.max_overlay)}  # fmt: skip
    checks |= {reason: limit is not None and row[score] > limit for reason, (score, limit) in further.items()}
    return [reason for reason, failed in checks.items() if failed]


def _check_captions(
    rows: list[Row], thumbnails: dict[str, NDArray[np.uint8]], config: QualityConfig
) -> dict[str, Any]:  # fmt: skip
    if not config.check_captions:
        return {"caption_check": "off"}
    captioned = [row for row in rows if row["caption_short"]]
    if len(captioned) < config.caption_min_rows:
        log.info("captions not checked: %d rows, at least %d needed", len(captioned), config.caption_min_rows)
        return {"caption_check": f"skipped: {len(captioned)} rows, needs {config.caption_min_rows}"}
    fit = caption_fit(
        np.stack([thumbnails[row["row_id"]] for row in captioned]), [row["caption_short"] for row in captioned]
    )
    for row, gap in zip(captioned, fit.gap, strict=True):
        row["caption_gap"] = round(float(gap), 1)
    explained = round(fit.explained, 4)
    if explained < config.caption_min_explained:
        log.info("captions not checked: pictures explain %.2f of their words", explained)
        return {"caption_check": "skipped: words say too little about the pictures", "caption_explained": explained}
    for row in captioned:
        if row["caption_gap"] > config.max_caption_gap:
            drop(row, "caption_mismatch")
    return {"caption_check": "done", "caption_explained": explained}

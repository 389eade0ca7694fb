"""Decide again from stored scores: other thresholds, nothing measured, batch by batch, so that memory is bounded.

Rows that only these thresholds dropped are decided anew; what other stages dropped stays dropped. A row that comes back
may lack the caption score, which is only measured on rows whose picture was good enough: those are kept and counted.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_curation.captions import COLUMNS as CAPTION_COLUMNS
from data_curation.captions import REASONS as CAPTION_REASONS
from data_curation.captions import failed as caption_failed
from data_curation.filter_config import CaptionThresholds, QualityThresholds, RedecideConfig
from data_curation.manifest import DROP, ERROR, KEEP, MANIFEST
from infra.errors import DataRefused

if TYPE_CHECKING:
    from infra.stages import StageContext

BATCH = 65_536
REASONS = ("too_small", "odd_aspect", "blurred", "over_compressed", "no_content", "bordered", "badly_exposed",
           "text_overlay", "caption_mismatch")  # fmt: skip
FURTHER = ("border", "clipped", "overlay")  # measured only where the quality stage was asked for them
NEEDED = ("width", "height", "blur", "jpeg_quality", "contrast", "caption_gap", "decision", "reasons")


def redecide(config: RedecideConfig, ctx: StageContext) -> dict[str, Any]:
    """The manifest of the quality stage with other thresholds."""
    return redecide_file(ctx.inputs["rows"] / MANIFEST, ctx.out / MANIFEST, config, config.captions)


def redecide_file(
    source: Path, target: Path, config: QualityThresholds, captions: CaptionThresholds | None = None
) -> dict[str, Any]:
    """Stream a manifest into another with every row decided by `config`; returns the funnel and how many rows changed."""
    before: Counter[str] = Counter()
    after: Counter[str] = Counter()
    first: dict[str, Counter[str]] = {DROP: Counter(), ERROR: Counter()}
    changed = unscored = 0
    with pq.ParquetFile(source, page_checksum_verification=True) as file:
        limits = dict(zip(FURTHER, (config.max_border, config.max_clipped, config.max_overlay), strict=True))
        needed = set(NEEDED) | {name for name, limit in limits.items() if limit is not None}
        needed |= set() if captions is None else set(CAPTION_COLUMNS)
        if missing := sorted(needed - set(file.schema_arrow.names)):
            raise DataRefused(
                f"{source} has no columns {missing}; give the manifest of the quality or captions stage that measured them"
            )
        with pq.ParquetWriter(target, file.schema_arrow, compression="zstd", write_page_checksum=True) as writer:
            for batch in file.iter_batches(BATCH):
                decided = decide(batch, config, captions)
                writer.write_batch(decided)
                before.update(batch["decision"].to_pylist())
                after.update(decided["decision"].to_pylist())
                for kind, counts in first.items():
                    lists = decided["reasons"].filter(pc.equal(decided["decision"], kind))
                    counts.update(pc.list_element(lists, 0).to_pylist())
                other = pc.not_equal(batch["decision"], decided["decision"])
                changed += pc.sum(other).as_py() or 0
                lacks = pc.and_(other, pc.and_(pc.equal(decided["decision"], KEEP), pc.is_null(batch["caption_gap"])))
                unscored += pc.sum(lacks).as_py() or 0
    received = sum(before.values())
    assert after[KEEP] + sum(first[DROP].values()) + after[ERROR] == received
    return {
        "received": received, "kept": after[KEEP], "errored": after[ERROR], "dropped": dict(sorted(first[DROP].items())),
        "errors": dict(sorted(first[ERROR].items())), "changed": changed, "back_without_caption_score": unscored,
    }  # fmt: skip


def decide(
    batch: pa.RecordBatch, config: QualityThresholds, captions: CaptionThresholds | None = None
) -> pa.RecordBatch:
    """A batch with `decision` and `reasons` by these thresholds."""
    old = batch["reasons"].fill_null(pa.scalar([], batch["reasons"].type))
    rules = REASONS if captions is None else (*REASONS, *CAPTION_REASONS)
    ours = _only_ours(old, rules) & pc.is_valid(batch["blur"]).to_numpy(zero_copy_only=False)
    ours &= pc.not_equal(batch["decision"], ERROR).to_numpy(zero_copy_only=False)
    failed = _failed(batch, config)
    if captions is not None:
        scores = {name: batch[name].to_numpy(zero_copy_only=False) for name in CAPTION_COLUMNS}
        failed = np.concatenate([failed, caption_failed(scores, captions)], axis=1)
    counts = failed.sum(axis=1)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    names = pa.array(rules).take(pa.array(np.nonzero(failed)[1]))
    new = pa.ListArray.from_arrays(pa.array(offsets), names).cast(old.type)
    places = np.arange(len(ours))
    reasons = pa.concat_arrays([old, new]).take(pa.array(np.where(ours, places + len(ours), places)))
    verdict = pc.if_else(pa.array(counts > 0), DROP, KEEP)
    decision = pc.if_else(pa.array(ours), verdict, batch["decision"])
    columns = {"reasons": reasons, "decision": decision}
    return pa.RecordBatch.from_arrays(
        [columns.get(name, batch[name]) for name in batch.schema.names], schema=batch.schema
    )


def _only_ours(reasons: pa.ListArray, rules: tuple[str, ...]) -> NDArray[np.bool_]:
    """Rows that have no reason but ours."""
    strange = pc.invert(pc.is_in(reasons.flatten(), value_set=pa.array(rules))).to_numpy(zero_copy_only=False)
    before = np.concatenate([[0], np.cumsum(strange)])
    ends = np.concatenate([[0], np.cumsum(pc.list_value_length(reasons).to_numpy(zero_copy_only=False))])
    none: NDArray[np.bool_] = before[ends[1:]] == before[ends[:-1]]
    return none


def _failed(batch: pa.RecordBatch, config: QualityThresholds) -> NDArray[np.bool_]:
    """Which rule each row fails, [rows, rules]; a score that is not there fails none."""

    def column(name: str) -> NDArray[np.float32]:  # as it is stored, so that a limit means what it meant when measured
        if name not in batch.schema.names:
            return np.full(len(batch), np.nan, np.float32)
        return np.asarray(batch[name].cast(pa.float64()).to_numpy(zero_copy_only=False), np.float32)

    def above(name: str, limit: float | None) -> NDArray[np.bool_]:
        return column(name) > np.float32(np.inf if limit is None else limit)

    width, height = column("width"), column("height")
    short, long = np.minimum(width, height), np.maximum(width, height)
    return np.stack([
        short < config.min_side, long > config.max_aspect * short.astype(np.float64), above("blur", config.max_blur),
        column("jpeg_quality") < config.min_jpeg_quality, column("contrast") < np.float32(config.min_contrast),
        above("border", config.max_border), above("clipped", config.max_clipped), above("overlay", config.max_overlay),
        above("caption_gap", config.max_caption_gap),
    ], axis=1)  # fmt: skip

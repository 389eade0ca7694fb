"""The manifest: one row per input URL, never deleted; every stage adds columns and says why a row leaves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra.errors import DataRefused

KEEP, DROP, ERROR = "keep", "drop", "error"
MANIFEST = "manifest.parquet"
SOURCE_SCHEMA = pa.schema([
    ("row_id", pa.string()), ("url", pa.string()), ("caption_short", pa.string()), ("caption_long", pa.string()),
    ("licence", pa.string()), ("domain", pa.string()), ("ordinal", pa.int64()), ("metadata", pa.string()),
])  # fmt: skip
ROWS_SCHEMA = pa.schema([
    *SOURCE_SCHEMA, ("image", pa.binary()), ("sha256_raw", pa.string()), ("sha256_stored", pa.string()),
    ("http_status", pa.int32()), ("final_url", pa.string()), ("detail", pa.string()), ("mime", pa.string()),
    ("width", pa.int32()), ("height", pa.int32()), ("num_bytes", pa.int64()),
    ("decision", pa.string()), ("reasons", pa.list_(pa.string())),
])  # fmt: skip
MANIFEST_SCHEMA = pa.schema([
    *(f for f in ROWS_SCHEMA if f.name != "image"),
    ("phash", pa.string()), ("keeper_id", pa.string()), ("keeper_origin", pa.string()), ("dup_distance", pa.int32()),
    ("blur", pa.float32()), ("jpeg_quality", pa.int32()), ("contrast", pa.float32()), ("caption_gap", pa.float32()),
    ("nsfw", pa.float32()), ("nsfw_model", pa.string()), ("nsfw_threshold", pa.float32()),
    ("bucket_w", pa.int32()), ("bucket_h", pa.int32()), ("buckets", pa.list_(pa.string())),
    ("crop_share", pa.float32()), ("split", pa.string()),
])  # fmt: skip
OPTIONAL_SCHEMA = pa.schema([  # of stages that are off unless a preset asks for them; columns only where they ran
    ("semantic_score", pa.float32()), ("semantic_model", pa.string()), ("semantic_threshold", pa.float32()),
    ("border", pa.float32()), ("clipped", pa.float32()), ("overlay", pa.float32()),
    ("caption_words", pa.int32()), ("caption_language", pa.string()), ("caption_file_name", pa.int32()),
    ("caption_filler", pa.float32()), ("caption_repeated", pa.float32()), ("caption_markup", pa.int32()),
    ("aesthetic", pa.float32()), ("aesthetic_model", pa.string()), ("aesthetic_threshold", pa.float32()),
    ("caption_long_model", pa.string()), ("caption_long_before", pa.string()),
    ("eval_overlap", pa.float32()), ("eval_match", pa.string()), ("eval_threshold", pa.float32()),
])  # fmt: skip

Row = dict[str, Any]


def write_table(rows: Sequence[Row], schema: pa.Schema, path: Path) -> None:
    """Rows as Parquet with page checksums, columns that a row lacks empty; the same rows give the same bytes."""
    columns = {name: [row.get(name) for row in rows] for name in schema.names}
    pq.write_table(
        pa.table(columns, schema=schema), path, compression="zstd", write_page_checksum=True, row_group_size=16_384
    )


def write_manifest(rows: Sequence[Row], folder: Path) -> None:
    """Write manifest.parquet, rows sorted by row_id; optional columns if any row has them."""
    there = set[str]().union(*rows)
    schema = pa.schema([*MANIFEST_SCHEMA, *(field for field in OPTIONAL_SCHEMA if field.name in there)])
    write_table(sorted(rows, key=lambda row: str(row["row_id"])), schema, folder / MANIFEST)


def read_manifest(folder: Path) -> list[Row]:
    """Rows of a filter stage, or of the download stage without its pictures."""
    if (folder / MANIFEST).exists():
        return _rows(pq.read_table(folder / MANIFEST, page_checksum_verification=True))
    columns = [name for name in ROWS_SCHEMA.names if name != "image"]
    return [
        row
        for path in shards(folder)
        for row in _rows(pq.read_table(path, columns=columns, page_checksum_verification=True))
    ]


def shards(folder: Path) -> list[Path]:
    """The picture shards of a download folder, in row order."""
    paths = sorted(folder.glob("rows-*.parquet"))
    if not paths:
        raise DataRefused(f"{folder}: no rows-*.parquet; give the output folder of the download stage")
    return paths


def pictures(shard: Path, wanted: set[str] | None = None) -> Iterator[tuple[str, bytes]]:
    """(row_id, encoded picture) of a shard's rows that have a picture and are wanted (None: all)."""
    for batch in pq.ParquetFile(shard, page_checksum_verification=True).iter_batches(256, columns=["row_id", "image"]):
        for row_id, image in zip(batch["row_id"].to_pylist(), batch["image"].to_pylist(), strict=True):
            if image is not None and (wanted is None or row_id in wanted):
                yield row_id, image


def drop(row: Row, *reasons: str) -> None:
    """Take a row out of the running, adding why."""
    row["decision"] = DROP
    row["reasons"] = [*(row["reasons"] or []), *reasons]


def funnel(rows: Sequence[Row], received: int) -> dict[str, Any]:
    """Counts of a stage; a dropped or errored row counts under its first reason."""
    decisions = Counter(str(row["decision"]) for row in rows)
    reasons = {kind: Counter(row["reasons"][0] for row in rows if row["decision"] == kind) for kind in (DROP, ERROR)}
    assert decisions[KEEP] + sum(reasons[DROP].values()) + decisions[ERROR] == received == len(rows)
    return {
        "received": received, "kept": decisions[KEEP], "errored": decisions[ERROR],
        "dropped": dict(sorted(reasons[DROP].items())), "errors": dict(sorted(reasons[ERROR].items())),
    }  # fmt: skip


def _rows(table: pa.Table) -> list[Row]:
    return list(table.to_pylist())

"""Pictures that came with their source (a folder, tars): judged as downloaded ones are, without a web between."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq

from data_curation.config import DownloadConfig
from data_curation.decoder import Decoder
from data_curation.fetch_process import verdict_of, write_shard
from data_curation.manifest import DROP, ERROR, Row

BODIES = "bodies"  # folder of Parquet files (row_id, body), in the order of urls.parquet


def judge_shard(item: tuple[Path, int, Path, DownloadConfig]) -> None:
    """Decode the bodies of one shard's rows and put the shard in its place."""
    source, start, target, config = item
    rows = pq.read_table(source / "urls.parquet").slice(start, config.shard_rows).to_pylist()
    wanted = {row["row_id"] for row in rows}
    verdicts: dict[str, Row] = {}
    with Decoder(config.max_pixels, config.decode_memory_mb, config.decode_seconds) as decoder:
        for path in files_of(source, start, len(rows)):
            for batch in pq.ParquetFile(path, page_checksum_verification=True).iter_batches(64):
                for row_id, body in zip(batch["row_id"].to_pylist(), batch["body"].to_pylist(), strict=True):
                    if row_id in wanted:
                        verdicts[row_id] = _verdict(body, decoder, config)
    write_shard(rows, verdicts, "lost_by_source", target)


def files_of(source: Path, start: int, count: int) -> Sequence[Path]:
    """The body files that hold rows start to start + count."""
    found, first = [], 0
    for path in sorted((source / BODIES).glob("*.parquet")):
        num_rows = pq.read_metadata(path).num_rows
        if first < start + count and first + num_rows > start:
            found.append(path)
        first += num_rows
    return found


def _verdict(body: bytes | None, decoder: Decoder, config: DownloadConfig) -> Row:
    if body is None:
        return {
            "decision": ERROR,
            "reasons": ["no_picture"],
            "detail": "named by the source, but not there or not readable",
        }
    if len(body) > config.max_bytes:
        return {"decision": DROP, "reasons": ["oversize"], "num_bytes": len(body)}
    return verdict_of(decoder.inspect(body))

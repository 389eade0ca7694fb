"""Manifest operations on 1 and 10 million synthetic rows: filter, decide again, join, each streamed in batches.

value: greatest growth exponent of CPU time from 1 to 10 million rows (bar 1.2); peak memory must stay below 2 GiB.
"""

from __future__ import annotations

import json
import math
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from benchmarks.record import record
from data_curation.filter_config import RedecideConfig
from data_curation.redecide import redecide_file
from infra.memory import forget_peak_memory, peak_memory

SEED, SIZES, BATCH = 0, (1_000_000, 10_000_000), 100_000
EXPONENT_BAR, MEMORY_BAR = 1.2, 2 << 30


def write_rows(path: Path, count: int) -> None:
    """A manifest of the quality stage's columns; a tenth was dropped as duplicates."""
    rng = np.random.default_rng(SEED)
    writer = None
    for start in range(0, count, BATCH):
        n = min(BATCH, count - start)
        kept = rng.random(n) > 0.1
        offsets = np.concatenate([[0], np.cumsum(~kept)]).astype(np.int32)
        table = pa.table({
            "row_id": [f"{i:012d}" for i in range(start, start + n)], "width": pa.array(rng.integers(40, 900, n), pa.int32()),
            "height": pa.array(rng.integers(40, 900, n), pa.int32()), "blur": pa.array(rng.random(n), pa.float32()),
            "jpeg_quality": pa.array(rng.integers(1, 100, n), pa.int32()),
            "contrast": pa.array(60 * rng.random(n), pa.float32()), "caption_gap": pa.array(30 * rng.random(n), pa.float32()),
            "decision": np.where(kept, "keep", "drop"),
            "reasons": pa.ListArray.from_arrays(offsets, pa.array(["near_duplicate"] * int((~kept).sum()), pa.string())),
        })  # fmt: skip
        writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd", write_page_checksum=True)
        writer.write_table(table)
    assert writer is not None
    writer.close()


def filtered(source: Path, target: Path) -> int:
    """Kept rows alone, as a new file."""
    scanner = ds.dataset(source).scanner(filter=pc.field("decision") == "keep", batch_size=BATCH, fragment_readahead=1)
    kept = 0
    with pq.ParquetWriter(target, scanner.projected_schema, compression="zstd") as writer:
        for batch in scanner.to_batches():
            writer.write_batch(batch)
            kept += len(batch)
    return kept


def joined(left: Path, right: Path) -> int:
    """Rows of both files whose decisions differ: a merge, both files being sorted by row_id."""
    different = 0
    pairs = zip(
        *(pq.ParquetFile(p).iter_batches(BATCH, columns=["row_id", "decision"]) for p in (left, right)), strict=True
    )
    for a, b in pairs:
        assert a["row_id"].equals(b["row_id"])
        different += pc.sum(pc.not_equal(a["decision"], b["decision"])).as_py() or 0
    return different


def measured(work: Callable[[], Any]) -> tuple[float, int, Any]:
    """CPU seconds of the process and its threads, peak memory, result."""
    forget_peak_memory()
    began = resource.getrusage(resource.RUSAGE_SELF)
    result = work()
    ended = resource.getrusage(resource.RUSAGE_SELF)
    return ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime, peak_memory(), result


def main() -> dict[str, Any]:
    """Both sizes, one after the other."""
    began = time.perf_counter()
    found: dict[str, dict[int, dict[str, Any]]] = {"filter": {}, "redecide": {}, "join": {}}
    with tempfile.TemporaryDirectory() as folder:
        for count in SIZES:
            source, kept, again = (Path(folder) / f"{name}.parquet" for name in ("rows", "kept", "again"))
            write_rows(source, count)
            work = {
                "filter": lambda s=source, k=kept: filtered(s, k),
                "redecide": lambda s=source, a=again: redecide_file(s, a, RedecideConfig(max_blur=0.4))["changed"],
                "join": lambda s=source, a=again: joined(s, a),
            }
            for name, call in work.items():
                seconds, peak, result = measured(call)
                found[name][count] = {"cpu_seconds": round(seconds, 2), "peak_memory_bytes": peak, "rows": result}
            assert found["join"][count]["rows"] == found["redecide"][count]["rows"]
    growth = {
        name: math.log10(max(sizes[SIZES[1]]["cpu_seconds"], 0.01) / max(sizes[SIZES[0]]["cpu_seconds"], 0.01))
        for name, sizes in found.items()
    }
    worst = max(growth.values())
    peak = max(size["peak_memory_bytes"] for sizes in found.values() for size in sizes.values())
    detail = {"operations": found, "exponents": growth, "peak_memory_bytes": peak,
              "memory_bar_bytes": MEMORY_BAR, "wall_seconds": round(time.perf_counter() - began, 1)}  # fmt: skip
    met = worst <= EXPONENT_BAR and peak < MEMORY_BAR
    return record("manifest_scale", [SEED], worst, 1.0, EXPONENT_BAR, met, detail)


if __name__ == "__main__":
    print(json.dumps(main()))

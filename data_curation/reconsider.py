"""Decide again from stored scores of models: other thresholds of `semantic`, `safety` and `aesthetic`, no model is run.

The three are decided in their order, as if they ran anew: semantic duplicates by the greedy cover over the stored cosines, then
nudity, then aesthetics. A row that comes back without the score of a later filter, which it was too bad to get, is not let
through: reason not_scored. Rows that other stages dropped stay dropped. Batch by batch, but for the rows with near ones.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_curation.dedup import worth
from data_curation.filter_config import ReconsiderConfig
from data_curation.manifest import DROP, ERROR, KEEP, MANIFEST, Row
from data_curation.semantic import DIGITS
from infra.errors import DataRefused

if TYPE_CHECKING:
    from infra.stages import StageContext

BATCH = 65_536
FILTERS = {"semantic": "min_cosine", "nsfw": "max_nsfw", "aesthetic": "min_score"}  # prefix of the columns -> setting
DECIDED = ("semantic_duplicate", "unsafe", "unaesthetic", "not_scored")
READ = ("row_id", "decision", "reasons", "keeper_id", "semantic_score", "semantic_model", "nsfw", "aesthetic",
        *(f"{name}_threshold" for name in FILTERS))  # fmt: skip
NEAR = ("row_id", "width", "height", "num_bytes", "semantic_near", "semantic_cosines")
Covered = dict[str, tuple[str, float]]  # row -> its keeper, their cosine


@dataclass(frozen=True)
class Limits:
    """Threshold of every filter; None where it did not run."""

    semantic: float | None
    nsfw: float | None
    aesthetic: float | None


def reconsider(config: ReconsiderConfig, ctx: StageContext) -> dict[str, Any]:
    """The manifest with other thresholds, and how many decisions they changed."""
    source = ctx.inputs["rows"] / MANIFEST
    before, after, changed = Counter[str](), Counter[tuple[str, str]](), 0
    with pq.ParquetFile(source, page_checksum_verification=True) as file:
        schema = file.schema_arrow
        limits = _limits(file, config, source)
        covered = (
            _covered(file, limits.semantic) if limits.semantic is not None and "semantic_near" in schema.names else {}
        )
        with pq.ParquetWriter(ctx.out / MANIFEST, schema, compression="zstd", write_page_checksum=True) as writer:
            for batch in file.iter_batches(BATCH):
                rows = batch.select([name for name in READ if name in schema.names]).to_pylist()
                old = [row["decision"] for row in rows]
                for row in rows:
                    _decide(row, limits, covered)
                writer.write_batch(_with(batch, rows))
                before.update(old)
                after.update((row["decision"], (row["reasons"] or [""])[0]) for row in rows)
                changed += sum(row["decision"] != decision for row, decision in zip(rows, old, strict=True))
    counts = {
        kind: {why: n for (what, why), n in sorted(after.items()) if what == kind} for kind in (KEEP, DROP, ERROR)
    }
    kept, errored = sum(counts[KEEP].values()), sum(counts[ERROR].values())
    assert kept + sum(counts[DROP].values()) + errored == before.total()
    return {"received": before.total(), "kept": kept, "errored": errored, "dropped": counts[DROP], "errors": counts[ERROR],
            "changed": changed}  # fmt: skip


def _limits(file: pq.ParquetFile, config: ReconsiderConfig, source: Path) -> Limits:
    """The new thresholds, or those that the filters had; refused where a filter did not run or did not store enough."""
    stored: dict[str, float | None] = dict.fromkeys(FILTERS)
    columns = [f"{name}_threshold" for name in FILTERS if f"{name}_threshold" in file.schema_arrow.names]
    for batch in file.iter_batches(BATCH, columns=columns):
        for name in FILTERS:
            column = batch[f"{name}_threshold"].drop_null() if f"{name}_threshold" in columns else pa.array([])
            stored[name] = column[0].as_py() if len(column) and stored[name] is None else stored[name]
    for name, setting in FILTERS.items():
        if getattr(config, setting) is not None and stored[name] is None:
            raise DataRefused(
                f"{source} has no scores of {name} to compare with {setting}; run that filter before this"
            )
    if config.min_cosine is not None and round(stored["semantic"] or 0, 6) > config.min_cosine:
        raise DataRefused(
            f"cosines below {stored['semantic']:.6g} were not stored, so min_cosine={config.min_cosine} cannot be decided; "
            "give at least that, or run the semantic filter with it"
        )
    new = {name: getattr(config, setting) for name, setting in FILTERS.items()}
    return Limits(**{name: stored[name] if new[name] is None else new[name] for name in FILTERS})


def _covered(file: pq.ParquetFile, min_cosine: float) -> Covered:
    """The greedy cover of the semantic stage: best rows first, each by its nearest better one that is kept."""
    near = [row for batch in file.iter_batches(BATCH, columns=list(NEAR)) for row in _valid(batch)]
    least, covered = round(min_cosine, 6), Covered()  # a threshold comes back from float32
    for row in sorted(near, key=worth):
        found = [
            (-round(cosine, DIGITS), place, keeper)  # of equals the better one, which stands first
            for place, (keeper, cosine) in enumerate(zip(row["semantic_near"], row["semantic_cosines"], strict=True))
            if round(cosine, DIGITS) >= least and keeper not in covered
        ]
        if found:
            distance, _, keeper = min(found)
            covered[row["row_id"]] = keeper, -distance
    return covered


def _valid(batch: pa.RecordBatch) -> list[Row]:
    rows: list[Row] = batch.filter(batch["semantic_near"].is_valid()).to_pylist()
    return rows


def _decide(row: Row, limits: Limits, covered: Covered) -> None:
    """One row in place, if nobody else dropped it and one of the filters saw it."""
    reasons = row["reasons"] or []
    seen = [name for name in FILTERS if row.get(f"{name}_threshold") is not None]
    if row["decision"] == ERROR or not seen or any(reason not in DECIDED for reason in reasons):
        return
    for name in seen:
        row[f"{name}_threshold"] = getattr(limits, name)
    if "semantic" in seen:
        row["keeper_id"], row["semantic_score"] = covered.get(row["row_id"], (None, None))
    reason = _reason(row, limits, covered)
    row["decision"], row["reasons"] = (KEEP, []) if reason is None else (DROP, [reason])


def _reason(row: Row, limits: Limits, covered: Covered) -> str | None:
    """The first of the filters that drops a row, in the order in which they run."""
    if row["row_id"] in covered:
        return "semantic_duplicate"
    if limits.nsfw is not None:
        if row["nsfw"] is None:
            return "not_scored"
        if round(row["nsfw"], DIGITS) > round(limits.nsfw, 6):
            return "unsafe"
    if limits.aesthetic is not None:
        if row["aesthetic"] is None:
            return "not_scored"
        if round(row["aesthetic"], DIGITS) < round(limits.aesthetic, 6):
            return "unaesthetic"
    return None


def _with(batch: pa.RecordBatch, rows: list[Row]) -> pa.RecordBatch:
    columns = {
        name: pa.array([row[name] for row in rows], batch.schema.field(name).type) for name in READ if name in rows[0]
    } if rows else {}  # fmt: skip
    return pa.RecordBatch.from_arrays(
        [columns.get(name, batch[name]) for name in batch.schema.names], schema=batch.schema
    )

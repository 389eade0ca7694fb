"""What earlier nights have seen: their URLs, signatures of every row they kept, and the search among those.

`signatures.parquet` lies beside a manifest and holds the rows of all nights so far; the next night gives that folder as
its input `known`. New rows are compared with known ones, known ones never with each other again. A manifest without
signatures still has hashes: then only very near ones count, because there is nothing to register.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_curation.copies import confirmed
from data_curation.filter_config import DedupConfig, RememberConfig
from data_curation.hamming import cross_pairs
from data_curation.hashing import VERSION
from data_curation.manifest import KEEP, MANIFEST, Row, drop, read_manifest, write_manifest
from data_curation.registration import SIDE

if TYPE_CHECKING:
    from infra.stages import StageContext

ROLE = "known"
SIGNATURES = "signatures.parquet"
SCHEMA = pa.schema([
    ("row_id", pa.string()), ("origin", pa.string()), ("sha256_raw", pa.string()), ("hash", pa.string()),
    ("phash", pa.string()), ("aspect", pa.float32()), ("thumbnail", pa.binary()),
])  # fmt: skip
MAX_LOG_ASPECT = 0.06
Thumbnails = dict[str, NDArray[np.uint8]]


def hash_name(config: DedupConfig) -> str:
    """Name of the hash; other hashes are not comparable."""
    return f"{VERSION}, {config.hash_size**2} bits"


def remember(config: RememberConfig, ctx: StageContext) -> dict[str, Any]:
    """The manifest of everything seen up to and including tonight."""
    before, tonight = read_manifest(ctx.inputs[ROLE]), read_manifest(ctx.inputs["manifest"])
    urls = {row["url"] for row in tonight}
    rows = [*(row for row in before if row["url"] not in urls), *tonight]
    write_manifest(rows, ctx.out)
    if (ctx.inputs["manifest"] / SIGNATURES).exists():
        signatures = read_known(ctx.inputs["manifest"], ctx.parents["manifest"].digest)
        _write(signatures, ctx.out)
    return {"rows": len(rows), "new": len(tonight), "kept": sum(row["decision"] == KEEP for row in rows)}


def seen_urls(ctx: StageContext) -> frozenset[str]:
    """URLs that were taken before; none without the role `known`."""
    if ROLE not in ctx.inputs:
        return frozenset()
    return frozenset(pq.read_table(ctx.inputs[ROLE] / MANIFEST, columns=["url"])["url"].to_pylist())


def read_known(folder: Path, origin: str) -> pa.Table:
    """Signatures of all rows known in a manifest's folder; `origin`: digest of that artifact, for rows first kept there."""
    path = folder / SIGNATURES
    if path.exists():
        table = pq.read_table(path, page_checksum_verification=True)
        at = table.schema.get_field_index("origin")
        return table.set_column(at, "origin", pc.if_else(pc.equal(table["origin"], ""), origin, table["origin"]))
    columns = ["row_id", "sha256_raw", "phash", "width", "height"]
    table = pq.read_table(
        folder / MANIFEST, columns=columns, filters=[("decision", "=", KEEP)], page_checksum_verification=True
    )
    bits = [len(value) * 4 if value else 0 for value in table["phash"].to_pylist()]
    none = [None] * len(table)
    return pa.table({
        "row_id": table["row_id"], "origin": [origin] * len(table), "sha256_raw": table["sha256_raw"],
        "hash": [f"{VERSION}, {n} bits" for n in bits], "phash": table["phash"],
        "aspect": pc.divide(pc.cast(table["width"], pa.float32()), pc.cast(table["height"], pa.float32())),
        "thumbnail": none,
    }, schema=SCHEMA)  # fmt: skip


def write_signatures(
    known: pa.Table | None, kept: list[Row], thumbnails: Thumbnails, config: DedupConfig, folder: Path
) -> None:
    """Everything known, then tonight's rows."""
    new = pa.Table.from_pylist([
        {"row_id": row["row_id"], "origin": "", "sha256_raw": row["sha256_raw"], "hash": hash_name(config),
         "phash": row["phash"], "aspect": row["width"] / row["height"],
         "thumbnail": thumbnails[row["row_id"]].tobytes()}
        for row in kept
    ], schema=SCHEMA)  # fmt: skip
    _write(new if known is None else pa.concat_tables([known, new]), folder)


def _write(table: pa.Table, folder: Path) -> None:
    pq.write_table(table, folder / SIGNATURES, compression="zstd", write_page_checksum=True, row_group_size=8_192)


def pass_on(source: Path, kept: set[str], out: Path) -> None:
    """Copy signatures without tonight's rows that later filters dropped."""
    if not (source / SIGNATURES).exists():
        return
    keep = pa.array(sorted(kept), pa.string())
    with (
        pq.ParquetFile(source / SIGNATURES, page_checksum_verification=True) as file,
        pq.ParquetWriter(out / SIGNATURES, SCHEMA, compression="zstd", write_page_checksum=True) as writer,
    ):
        for batch in file.iter_batches(8_192):
            known = pc.or_(pc.not_equal(batch["origin"], ""), pc.is_in(batch["row_id"], value_set=keep))
            writer.write_batch(batch.filter(known))


def drop_known_bytes(rows: list[Row], known: pa.Table, reason: str = "exact_duplicate") -> None:
    """Drop rows with the bytes of a known row."""
    first: dict[str, tuple[str, str]] = {}
    for sha256, row_id, origin in zip(*(known[c].to_pylist() for c in ("sha256_raw", "row_id", "origin")), strict=True):
        first.setdefault(sha256, (row_id, origin))
    for row in rows:
        if keeper := first.get(row["sha256_raw"]):
            drop(row, reason)
            row["keeper_id"], row["keeper_origin"] = keeper
            row["dup_distance"] = 0


def drop_known_copies(
    rows: list[Row], thumbnails: Thumbnails, known: pa.Table, config: DedupConfig, reason: str = "near_duplicate"
) -> dict[str, Any]:
    """Drop rows whose picture is a copy of a known one; the nearest known row is named as the keeper."""
    usable = known.filter(pc.equal(known["hash"], hash_name(config)))
    facts = {"known_rows": len(known), "known_other_hash": len(known) - len(usable)}
    if not rows or not len(usable):
        return facts
    i, j, distance = cross_pairs(
        _bits([r["phash"] for r in rows]), _bits(usable["phash"].to_pylist()), config.max_distance
    )
    aspect = np.log([row["width"] / row["height"] for row in rows])
    near = np.abs(aspect[i] - np.log(usable["aspect"].to_numpy())[j]) < MAX_LOG_ASPECT
    i, j, distance = i[near], j[near], distance[near]
    bare = usable["thumbnail"].is_null().to_numpy()[j]
    copies = bare & (distance <= config.known_distance)
    shown = np.flatnonzero(~bare)
    stored = usable["thumbnail"]
    names = [f"known {k}" for k in range(len(usable))]
    loaded = {
        names[k]: np.frombuffer(stored[int(k)].as_py(), np.uint8).reshape(SIDE, SIDE, 3) for k in np.unique(j[shown])
    }
    row_ids = [row["row_id"] for row in rows]
    copies[shown] = confirmed(row_ids, thumbnails | loaded, i[shown], j[shown], distance[shown], config, names)
    i, j, distance = i[copies], j[copies], distance[copies]
    for k in np.lexsort((j, distance)):
        row = rows[i[k]]
        if row["decision"] == KEEP:
            drop(row, reason)
            row["keeper_id"], row["dup_distance"] = usable["row_id"][int(j[k])].as_py(), int(distance[k])
            row["keeper_origin"] = usable["origin"][int(j[k])].as_py()
    return facts


def _bits(phashes: list[str]) -> NDArray[np.uint8]:
    return np.frombuffer(bytes.fromhex("".join(phashes)), np.uint8).reshape(len(phashes), -1)

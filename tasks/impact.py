"""What did this make? From a URL, a hash or a picture forward to every checkpoint that learnt from it: the take-down question.

A copy that curation dropped is not trained on, but the picture kept in its place is: both are followed. A picture given
as a file is also compared by perceptual hash, since the web serves the same picture in other bytes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_curation.known import ROLE
from infra.artifacts import Artifact
from infra.errors import DataRefused
from infra.lineage import Graph
from infra.storage import Store
from tasks.lineage import TRAINING_SET, index_of, manifest_table, trained_on, trainers

NAMES = ("row_id", "url", "final_url", "sha256_raw", "sha256_stored", "phash")  # columns that may name a picture

REMEMBER = "remember"  # the stage that adds a night to the rows seen before
COLUMNS = (*NAMES, "decision", "reasons", "keeper_id", "dup_distance", "caption_short")
ITSELF, KEPT, COPY, ALIKE = ORDER = "is it", "kept in its place", "a copy of it", "looks like it"
MOST_DIFFERENT = 1 / 24  # share of hash bits in which a picture given as a file may differ and still be shown


@dataclass(frozen=True)
class Asked:
    """The picture in question: the text that names it, and the decoded picture where the file itself was given."""

    name: str
    picture: bytes | None = None


def asked(what: str) -> Asked:
    """A file is known by its sha256 and its perceptual hash, anything else by its text."""
    path = Path(what).expanduser()
    if not path.is_file():
        return Asked(what)
    from data_curation.config import DownloadConfig
    from data_curation.decoder import Decoder

    data, limits = path.read_bytes(), DownloadConfig()
    with Decoder(limits.max_pixels, limits.decode_memory_mb, limits.decode_seconds) as decoder:
        found = decoder.inspect(data)
    if found.reason is not None or found.image is None:
        raise DataRefused(f"{path} is no picture that can be looked for: {found.reason}; give its URL or sha256")
    return Asked(hashlib.sha256(data).hexdigest(), found.image)


def impact(store: Store, graph: Graph, what: str) -> dict[str, Any]:
    """Rows that are the picture or stand for it, the stages that trained on them, and all that was made from those."""
    question, manifests = asked(what), _last_manifests(graph)
    found = matches([manifest_table(store, manifest, COLUMNS) for manifest in manifests], question)
    rows: list[dict[str, Any]] = []
    direct: dict[str, dict[str, Any]] = {}  # digest -> what it saw
    for manifest, own in zip(manifests, found, strict=True):
        rows += [{"manifest": manifest.digest, **row} for row in own]
        ids = [row["row_id"] for row in own]
        for artifact, seen in _trained(store, graph, manifest, ids) if ids else []:
            entry = direct.setdefault(
                artifact.digest, {**_about(artifact), "trained": True, "made_from": [], "rows": []}
            )
            entry["rows"] = sorted({*entry["rows"], *seen})
    derived = [
        {**_about(artifact), "trained": False, "made_from": sorted({each.stage for each in hit.values()}), "rows": []}
        for artifact, hit in graph.descendants(direct)
    ]
    runs = _runs(store)
    affected = [{**entry, "runs": runs.get(entry["digest"], [])} for entry in (*direct.values(), *derived)]
    return {"asked": what, "rows": rows, "affected": affected}


def matches(tables: Sequence[pa.Table], question: Asked) -> list[list[dict[str, Any]]]:
    """Rows of each manifest that are the picture, were kept in its place, are copies of it, or look like it.

    The picture kept in a row's place may lie in the manifest of an earlier night: row ids hold the hash of their URL.
    """
    near = [_alike(table, question.picture) for table in tables]
    itself = [_where_any(table, NAMES, [question.name]) for table in tables]
    named = [row_id for part in itself for row_id in part["row_id"].to_pylist()]
    kept = [row_id for part in itself if "keeper_id" in part.schema.names
            for row_id in part["keeper_id"].drop_null().to_pylist()]  # fmt: skip
    found = []
    for table, alike in zip(tables, near, strict=True):
        copies = _where_any(table, ("keeper_id",), [*named, *kept])["row_id"].to_pylist()
        relation = dict.fromkeys(alike, ALIKE) | dict.fromkeys(copies, COPY)
        relation |= dict.fromkeys(kept, KEPT) | dict.fromkeys(named, ITSELF)
        rows = _where_any(table, ("row_id",), list(relation)).to_pylist()
        about = [{**row, "relation": relation[row["row_id"]], "bits": alike.get(row["row_id"])} for row in rows]
        found.append(sorted(about, key=lambda row: (ORDER.index(row["relation"]), row["row_id"])))
    return found


def _where_any(table: pa.Table, columns: Sequence[str], values: Sequence[str]) -> pa.Table:
    """Rows in which any of the columns has any of the values."""
    wanted = pa.array(values, pa.string())
    mask = pa.array(np.zeros(table.num_rows, bool))
    for column in columns:
        if column in table.schema.names:
            mask = pc.or_(mask, pc.is_in(table[column], value_set=wanted))
    return table.filter(mask)


def _alike(table: pa.Table, picture: bytes | None) -> dict[str, int]:
    """Row id -> number of differing bits, of rows whose perceptual hash is near that of a picture."""
    if picture is None or "phash" not in table.schema.names:
        return {}
    hashed = table.filter(pc.is_valid(table["phash"]))
    if not hashed.num_rows:
        return {}
    from data_curation.hashing import phash

    hashes = np.frombuffer(bytes.fromhex("".join(hashed["phash"].to_pylist())), np.uint8)
    hashes = hashes.reshape(hashed.num_rows, -1)
    num_bits = 8 * hashes.shape[1]
    different = np.bitwise_count(hashes ^ phash(picture, math.isqrt(num_bits))).sum(1)
    near = np.flatnonzero(different <= MOST_DIFFERENT * num_bits)
    return {hashed["row_id"][int(place)].as_py(): int(different[place]) for place in near}


def _last_manifests(graph: Graph) -> list[Artifact]:
    """Manifests from which no further one was curated: they hold every row with its last decision.

    An earlier night's rows are compared with (the role `known`), not curated further; and what a night remembers for the
    next one repeats the rows of all nights.
    """
    manifests = [each for each in graph.ordered if each.kind == "manifest" and each.facts.get("function") != REMEMBER]
    before = {each.digest for manifest in manifests for role, each in graph.inputs(manifest).items() if role != ROLE}
    return [manifest for manifest in manifests if manifest.digest not in before]


def _trained(store: Store, graph: Graph, manifest: Artifact, ids: Sequence[str]) -> list[tuple[Artifact, list[str]]]:
    """Stages that selected any of the rows from a training set encoded from the manifest, and which of them."""
    found, wanted = [], pa.array(ids, pa.string())
    sets = [each for each, _ in graph.descendants([manifest.digest]) if each.kind == TRAINING_SET]
    for data in sets:
        index = index_of(store, data)
        index = index.filter(pc.is_in(index["row_id"], value_set=wanted))
        users = [each for each, _ in graph.descendants([data.digest])] if index.num_rows else []
        for artifact, source in trainers(graph, users):
            seen = trained_on(artifact, index) if source.digest == data.digest else []
            if seen:
                found.append((artifact, seen))
    return found


def _runs(store: Store) -> Mapping[str, list[str]]:
    """Digest -> names of the runs it belongs to."""
    runs: dict[str, list[str]] = {}
    for run in store.list_runs():
        for stage in run.get("stages", []):
            if stage.get("digest"):
                runs.setdefault(stage["digest"], []).append(run["run"])
    return runs


def _about(artifact: Artifact) -> dict[str, Any]:
    return {"stage": artifact.stage, "kind": artifact.kind, "digest": artifact.digest, "uri": artifact.uri}

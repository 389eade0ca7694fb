"""A new night's copies of what was kept before are found, named with the night they lie in, and never the other way."""

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_curation.dedup import deduplicate
from data_curation.filter_config import DedupConfig
from data_curation.hamming import all_pairs, cross_pairs
from data_curation.known import SIGNATURES, pass_on
from data_curation.manifest import ROWS_SCHEMA, Row, read_manifest, write_table
from data_curation.scenes import Scene, draw
from infra.artifacts import Artifact
from infra.stages import StageContext

Make = Callable[..., StageContext]


def drawn(name: str, seed: int) -> Image.Image:
    return draw(Scene("big", (name,), "blue"), 160, 160, np.random.default_rng(seed))


def row(row_id: str, picture: Image.Image, quality: int = 90) -> Row:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    body = file.getvalue()
    return {"row_id": row_id, "image": body, "sha256_raw": str(hash(body)), "width": picture.width,
            "height": picture.height, "num_bytes": len(body), "decision": "keep", "reasons": []}  # fmt: skip


def night(root: Path, context: Make, rows: list[Row], known: str | None = None) -> dict[str, Row]:
    root.mkdir(exist_ok=True)
    (root / "download").mkdir()
    write_table(rows, ROWS_SCHEMA, root / "download" / "rows-00000.parquet")
    ctx = context(root, "dedup", rows="download", **({"known": known} if known else {}))
    before = Artifact(kind="manifest", uri="file:///x", digest=f"digest of {known}", stage="dedup")
    facts = deduplicate(DedupConfig(), dataclasses.replace(ctx, parents={"known": before}))
    assert facts["received"] == len(rows) == facts["kept"] + sum(facts["dropped"].values())
    return {found["row_id"]: found for found in read_manifest(root / "dedup")}


def test_three_nights(tmp_path: Path, context: Make) -> None:
    cat, car, key = (drawn(name, seed) for seed, name in enumerate(("cat", "car", "key")))
    night(tmp_path / "1", context, [row("same-id", cat), row("b", car)])
    second = [row("same-id", cat, 60), row("exact", car), row("new", key)]
    found = night(tmp_path / "2", context, second, "../1/dedup")
    assert [found[k]["decision"] for k in ("same-id", "exact", "new")] == ["drop", "drop", "keep"]
    assert found["same-id"]["reasons"] == ["near_duplicate"]
    assert found["same-id"]["dup_distance"] <= 24
    assert (found["exact"]["reasons"], found["exact"]["keeper_id"]) == (["exact_duplicate"], "b")
    assert {found[k]["keeper_origin"] for k in ("same-id", "exact")} == {"digest of ../1/dedup"}

    third = night(tmp_path / "3", context, [row("old", cat, 55), row("late", key, 60)], "../2/dedup")
    assert third["old"]["keeper_origin"] == "digest of ../1/dedup"  # from two nights ago, by what was handed on
    assert (third["late"]["keeper_id"], third["late"]["keeper_origin"]) == ("new", "digest of ../2/dedup")
    again = night(tmp_path / "4", context, [row("c", drawn("cat", 77)), row("d", drawn("bell", 5))], "../3/dedup")
    assert [again[k]["decision"] for k in ("c", "d")] == ["keep", "keep"]  # the same motif drawn again is new


def test_a_manifest_without_signatures_still_has_hashes(tmp_path: Path, context: Make) -> None:
    cat = drawn("cat", 0)
    night(tmp_path / "1", context, [row("a", cat)])
    (tmp_path / "1" / "dedup" / SIGNATURES).unlink()
    found = night(tmp_path / "2", context, [row("b", cat, 60), row("c", drawn("cat", 9))], "../1/dedup")
    assert [found[k]["decision"] for k in ("b", "c")] == ["drop", "keep"]


def test_what_later_filters_dropped_is_not_known(tmp_path: Path, context: Make) -> None:
    night(tmp_path / "1", context, [row("a", drawn("cat", 0)), row("b", drawn("car", 1))])
    pass_on(tmp_path / "1" / "dedup", {"b"}, tmp_path)
    assert pq.read_table(tmp_path / SIGNATURES)["row_id"].to_pylist() == ["b"]


@pytest.mark.parametrize("distance", [0, 20, 40])
def test_cross_pairs_are_the_pairs_between(distance: int) -> None:
    rng = np.random.default_rng(distance)
    hashes = rng.integers(0, 4, (60, 8), dtype=np.uint8)
    i, j, found = all_pairs(hashes, distance)
    between = (i < 20) & (j >= 20)
    got = cross_pairs(hashes[:20], hashes[20:], distance)
    for a, b in zip(got, (i[between], j[between] - 20, found[between]), strict=True):
        assert np.array_equal(a, b)
    assert distance == 0 or len(got[0]) > 0

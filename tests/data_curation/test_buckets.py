"""Buckets, the funnel, and the score against the truth."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_curation.buckets import SQUARE, bucket_sizes, crop_share, nearest_bucket
from data_curation.config import BucketsConfig, ResolutionConfig
from data_curation.manifest import DROP, ERROR, KEEP, Row, funnel, read_manifest, write_manifest
from data_curation.truth import score_truth


def test_every_bucket_is_a_multiple_of_the_patch_with_about_the_same_area() -> None:
    config = BucketsConfig()
    assert bucket_sizes(config.resolutions[0], config) == [(32, 32)]
    assert bucket_sizes(config.resolutions[1], config) == [(28, 56), (32, 48), (40, 40), (48, 32), (56, 28)]
    for side in range(16, 520, 4):
        for width, height in bucket_sizes(ResolutionConfig(side=side), config):
            assert width % 4 == height % 4 == 0
            assert 0.8 < width * height / side**2 < 1.25


def test_the_nearest_bucket_cuts_little() -> None:
    config = BucketsConfig()
    sizes = bucket_sizes(config.resolutions[1], config)
    assert nearest_bucket(200, 100, sizes) == (56, 28)
    assert nearest_bucket(100, 200, sizes) == (28, 56)
    assert crop_share(200, 100, (56, 28)) == pytest.approx(0)
    assert crop_share(300, 200, (40, 40)) == pytest.approx(1 / 3)
    assert SQUARE < 1.5


def row(row_id: str, decision: str = KEEP, reason: str | None = None, keeper: str | None = None) -> Row:
    return {"row_id": row_id, "decision": decision, "reasons": [reason] if reason else [], "keeper_id": keeper}


def test_a_row_that_is_not_accounted_for_stops_the_stage(tmp_path: Path) -> None:
    rows = [row("b", DROP, "blurred"), row("a"), row("c", ERROR, "http_404")]
    facts = funnel(rows, 3)
    assert (facts["kept"], facts["errored"], facts["dropped"]) == (1, 1, {"blurred": 1})
    with pytest.raises(AssertionError):
        funnel(rows, 4)
    write_manifest(rows, tmp_path)
    assert [r["row_id"] for r in read_manifest(tmp_path)] == ["a", "b", "c"]


def test_the_truth_counts_a_swapped_original_as_its_copy_caught(tmp_path: Path) -> None:
    defects = {"a": (None, None), "b": ("near_duplicate", "a"), "c": ("blurred", None), "d": (None, None),
               "e": ("near_duplicate", "d")}  # fmt: skip
    columns = {
        "row_id": list(defects), "defect": [d for d, _ in defects.values()],
        "duplicate_of": [o for _, o in defects.values()],
    }  # fmt: skip
    pq.write_table(pa.table(columns), tmp_path / "truth.parquet")
    rows = [row("a", DROP, "near_duplicate", "b"), row("b"), row("c", DROP, "too_small"),
            row("d", DROP, "near_duplicate", "b"), row("e")]  # fmt: skip
    truth = score_truth(rows, tmp_path)
    assert truth["defects"]["near_duplicate"] == {"planted": 2, "caught": 1}
    assert truth["defects"]["blurred"] == {"planted": 1, "caught": 0}  # dropped, but for another reason
    assert truth["near_duplicate_precision"] == 0.5
    assert (truth["sound_rows"], truth["lost_by_reason"]) == (2, {"near_duplicate": 1})

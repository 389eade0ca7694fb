"""Buckets, the funnel, and the score against the truth."""

import math
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_curation.bucket_facts import crop_share, resolution_facts
from data_curation.buckets import SQUARE, assign_buckets, bucket_sizes, nearest_bucket
from data_curation.config import BucketsConfig, EveryShape, ResolutionConfig
from data_curation.manifest import DROP, ERROR, KEEP, Row, funnel, read_manifest, write_manifest
from data_curation.truth import score_truth
from infra.config import versioned
from infra.errors import ConfigError
from infra.stages import StageContext


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


def every(side: int, patch: int, **limits: float) -> list[tuple[int, int]]:
    config = BucketsConfig(patch=patch, every=EveryShape(**limits))
    return bucket_sizes(ResolutionConfig(side=side), config)


@pytest.mark.parametrize(
    ("side", "patch", "tolerance"), [(40, 4, 0.02), (256, 16, 0.02), (1024, 16, 0.02), (120, 8, 0.1)]
)
def test_every_shape_near_the_budget_is_a_bucket(side: int, patch: int, tolerance: float) -> None:
    found = every(side, patch, tolerance=tolerance, min_ratio=0.4, max_ratio=3)
    grid = range(patch, 4 * side, patch)
    budget = side * side
    shapes = {
        (w, h) for w in grid for h in grid
        if abs(w * h - budget) <= tolerance * budget and 0.4 <= w / h <= 3
    }  # fmt: skip
    assert set(found) <= shapes
    for w, h in shapes - set(found):  # only shapes of a ratio that is there already, nearer to the budget
        twin = next(size for size in found if size[0] * h == size[1] * w)
        assert abs(twin[0] * twin[1] - budget) <= abs(w * h - budget)
    assert len({w / h for w, h in shapes}) == len(found) > 2
    assert (side, side) in found


def test_every_shape_cuts_less_than_a_few_ratios_and_squares_stay_square() -> None:
    draw = random.Random(0)
    pictures = [(draw.randint(1100, 3000), draw.randint(1100, 3000)) for _ in range(300)]
    few = bucket_sizes(ResolutionConfig(side=1024), BucketsConfig(patch=16))
    many = every(1024, 16, min_ratio=0.35, max_ratio=2.8)
    cuts = [sum(crop_share(w, h, nearest_bucket(w, h, sizes)) for w, h in pictures) / 300 for sizes in (few, many)]
    assert cuts[1] < 0.01 < 0.05 < cuts[0]
    square = ResolutionConfig(side=32, aspects="square")
    assert bucket_sizes(square, BucketsConfig(every=EveryShape())) == [(32, 32)]


def test_every_shape_is_refused_where_the_grid_is_too_coarse() -> None:
    with pytest.raises(ConfigError, match=r"no bucket of resolution 100 .* patch=64 .* 10000 px; raise"):
        every(100, 64, min_ratio=1, max_ratio=1)


def test_a_setting_that_is_not_used_changes_no_key() -> None:
    assert "every" not in versioned(BucketsConfig())
    assert versioned(BucketsConfig(every=EveryShape()))["every"]["tolerance"] == 0.02


def test_bucketing_says_per_resolution_what_it_costs(tmp_path: Path, context: Callable[..., StageContext]) -> None:
    sizes = {"a": (128, 128), "b": (120, 60), "c": (60, 120), "d": (96, 60), "small": (31, 39)}
    (tmp_path / "rows").mkdir()
    write_manifest([row(name) | {"width": w, "height": h} for name, (w, h) in sizes.items()], tmp_path / "rows")
    config = BucketsConfig(every=EveryShape(min_ratio=0.25, max_ratio=4), validation_share=0)
    facts = assign_buckets(config, context(tmp_path, "buckets", rows="rows"))
    assert facts["dropped"] == {"too_small_for_bucket": 1}
    rows = {r["row_id"]: r for r in read_manifest(tmp_path / "buckets")}
    placed = {name: tuple(rows[name]["buckets"]) for name in "abcd"}
    assert placed["a"] == ("32:32x32", "40:40x40")
    square, wide = facts["resolutions"]["32"], facts["resolutions"]["40"]
    assert square == {"pictures": 1, "buckets": 1, "possible": 1, "cropped": 0, "cropped_p95": 0, "downscaled": 0.9375,
                      "left_over": {"16": 1, "64": 1, "256": 1}}  # fmt: skip
    buckets = [tuple(map(int, placed[name][-1].split(":")[1].split("x"))) for name in "abcd"]
    cuts = [crop_share(*sizes[name], bucket) for name, bucket in zip("abcd", buckets, strict=True)]
    assert wide["pictures"] == 4
    assert wide["cropped"] == pytest.approx(sum(cuts) / 4, abs=1e-4)
    lost = [
        1 - w * h / (math.prod(sizes[name]) * (1 - cut))
        for name, cut, (w, h) in zip("abcd", cuts, buckets, strict=True)
    ]
    assert wide["downscaled"] == pytest.approx(sum(lost) / 4, abs=1e-4)


def test_rows_that_fill_no_batch_are_counted_as_the_loader_would_fill_them_up() -> None:
    kept = [row(str(i)) | {"width": 64, "height": 64, "buckets": ["32:32x32"], "split": "train" if i < 70 else "validation"}
            for i in range(90)]  # fmt: skip
    left = resolution_facts(kept, {32: 1, 40: 5})
    assert left["32"]["left_over"] == {"16": round(6 / 70, 4), "64": round(6 / 70, 4), "256": 1}
    assert left["40"] == {"pictures": 0, "buckets": 0, "possible": 5}


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

"""Thresholds are applied to stored scores as the quality stage would have applied them."""

from pathlib import Path

import numpy as np
import pytest

from data_curation.filter_config import QualityConfig, RedecideConfig
from data_curation.manifest import DROP, Row, drop, read_manifest, write_manifest
from data_curation.quality import technical_reasons
from data_curation.redecide import redecide_file
from infra.errors import DataRefused

OLD = QualityConfig()


def scored(number: int = 400) -> list[Row]:
    rng = np.random.default_rng(0)
    rows: list[Row] = []
    for i in range(number):
        row: Row = {"row_id": f"{i:04d}", "width": int(rng.integers(40, 400)), "height": int(rng.integers(40, 400)),
                    "decision": "keep", "reasons": []}  # fmt: skip
        if i % 10 == 0:
            row |= {"decision": "error", "reasons": ["http_404"], "width": None, "height": None}
        elif i % 10 == 1:
            drop(row, "near_duplicate")
        else:
            quality = int(rng.integers(5, 100))
            row |= {"blur": float(np.float32(rng.random())), "jpeg_quality": quality if i % 3 else None,
                    "contrast": float(np.float32(5 * rng.random()))}  # fmt: skip
            if reasons := technical_reasons(row, OLD):
                drop(row, *reasons)
        rows.append(row)
    return rows


def test_a_limit_means_what_it_meant_when_the_score_was_measured(tmp_path: Path) -> None:
    row = scored(6)[5] | {"width": 99, "height": 99, "blur": 0.1, "jpeg_quality": None, "contrast": 2.3,
                          "border": 0.1, "clipped": 0.3, "overlay": 22.1, "decision": "keep", "reasons": []}  # fmt: skip
    at = {"max_blur": 0.1, "min_contrast": 2.3, "max_border": 0.1, "max_clipped": 0.3, "max_overlay": 22.1}
    (tmp_path / "old").mkdir()
    write_manifest([row], tmp_path / "old")  # stored as float32: 0.1 is 0.10000000149
    for settings, wanted in (
        (at, []), (at | {"max_border": 0.09}, ["bordered"]), (at | {"max_clipped": 0.2}, ["badly_exposed"]),
        (at | {"max_overlay": 22.0}, ["text_overlay"]), ({"max_border": None}, []),
    ):  # fmt: skip
        assert technical_reasons(row, QualityConfig(**settings)) == wanted
        redecide_file(tmp_path / "old" / "manifest.parquet", tmp_path / "manifest.parquet", RedecideConfig(**settings))
        assert read_manifest(tmp_path)[0]["reasons"] == wanted


@pytest.mark.parametrize("new", [{"max_blur": 0.9, "min_contrast": 0.2}, {"min_jpeg_quality": 80}, {}])
def test_decisions_equal_those_of_the_stage(tmp_path: Path, new: dict[str, float]) -> None:
    rows = scored()
    (tmp_path / "old").mkdir()
    write_manifest(rows, tmp_path / "old")
    facts = redecide_file(tmp_path / "old" / "manifest.parquet", tmp_path / "manifest.parquet", RedecideConfig(**new))
    found = {row["row_id"]: row for row in read_manifest(tmp_path)}
    assert facts["received"] == 400 == facts["kept"] + facts["errored"] + sum(facts["dropped"].values())
    changed = 0
    for row in rows:
        wanted = row["reasons"]
        if row.get("blur") is not None:
            wanted = technical_reasons(row, QualityConfig(**new))
            assert found[row["row_id"]]["decision"] == (DROP if wanted else "keep")
        assert found[row["row_id"]]["reasons"] == wanted
        changed += found[row["row_id"]]["decision"] != row["decision"]
    assert (facts["changed"], changed > 0) == (changed, bool(new))


def test_a_manifest_without_scores_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"row_id": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(DataRefused, match="no columns"):
        redecide_file(tmp_path / "x.parquet", tmp_path / "y.parquet", RedecideConfig())
    write_manifest(scored(), tmp_path)
    with pytest.raises(DataRefused, match=r"no columns \['border'\]; give the manifest of the quality"):
        redecide_file(tmp_path / "manifest.parquet", tmp_path / "y.parquet", RedecideConfig(max_border=0.1))


@pytest.mark.parametrize(
    "field", [{"max_blur": 1.5}, {"min_jpeg_quality": -1}, {"max_aspect": 0.5}, {"max_caption_gap": 0}]
)
def test_thresholds_out_of_range_are_refused(field: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="Input should be"):
        RedecideConfig(**field)

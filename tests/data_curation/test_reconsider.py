"""Other thresholds of model scores: what the filters themselves would have decided, without running a model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_curation import aesthetic, safety, semantic
from data_curation.config import DataConfig
from data_curation.filter_config import AestheticConfig, ReconsiderConfig, SafetyConfig, SemanticConfig
from data_curation.manifest import ROWS_SCHEMA, Row, read_manifest, write_manifest, write_table
from data_curation.reconsider import reconsider
from infra.config import parse
from infra.errors import ConfigError, DataRefused
from infra.stages import StageContext

COUNT = 60
Make = Callable[..., StageContext]
DRAW = np.random.default_rng(0)
VECTORS = DRAW.normal(size=(COUNT, 3)).astype(np.float32)
VECTORS /= np.linalg.norm(VECTORS, axis=1, keepdims=True)
NSFW, HEAD = DRAW.uniform(size=COUNT), np.array([1.0, 0.5, 0.2], np.float32)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Rows with pictures; the models' outputs are given, what the stages decide from them is their own."""
    from safetensors.numpy import save_file

    def embedded(item: Any) -> tuple[str, list[tuple[str, np.ndarray]]]:
        return "given", [(f"r{i:02}", VECTORS[i]) for i in range(COUNT) if f"r{i:02}" in item[1]]

    def scored(item: Any) -> list[tuple[str, float]]:
        return [(f"r{i:02}", float(NSFW[i])) for i in range(COUNT) if f"r{i:02}" in item[1]]

    monkeypatch.setattr(semantic, "embed_shard", embedded)
    monkeypatch.setattr(aesthetic, "embed_shard", embedded)
    monkeypatch.setattr(safety, "score_shard", scored)
    rows: list[Row] = [
        {"row_id": f"r{i:02}", "image": b"x", "width": 100 + i % 7, "height": 100, "num_bytes": 9, "decision": "keep",
         "reasons": []} for i in range(COUNT)
    ]  # fmt: skip
    rows[3] |= {"decision": "drop", "reasons": ["blurred"]}
    rows[4] |= {"decision": "error", "reasons": ["http_404"], "image": None}
    (tmp_path / "download").mkdir()
    write_table(rows, ROWS_SCHEMA, tmp_path / "download" / "rows-00000.parquet")
    save_file({"weight": HEAD[None], "bias": np.zeros(1, np.float32)}, tmp_path / "head.safetensors")
    return tmp_path


def filtered(place: Path, make: Make, name: str, cosine: float | None, nsfw: float | None, score: float | None) -> str:
    """The last of the filters that were asked for, run with these thresholds."""
    last, images = "download", {"images": "download"}
    if cosine is not None:
        semantic.semantic_dedup(SemanticConfig(min_cosine=cosine), make(place, f"{name}-semantic", rows=last, **images))
        last = f"{name}-semantic"
    if nsfw is not None:
        safety.filter_safety(SafetyConfig(max_nsfw=nsfw), make(place, f"{name}-safety", rows=last, **images))
        last = f"{name}-safety"
    if score is not None:
        config = AestheticConfig(head={"path": str(place / "head.safetensors")}, min_score=score)
        aesthetic.filter_aesthetic(config, make(place, f"{name}-aesthetic", rows=last, **images))
        last = f"{name}-aesthetic"
    return last


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((0.8, None, None), (0.8, None, None)), ((0.8, None, None), (0.97, None, None)),
        ((None, 0.9, 0.1), (None, 0.4, 0.6)), ((None, 0.9, None), (None, 0.35, None)),
        ((None, 0.3, None), (None, 0.9, None)), ((0.9, 0.9, 0.1), (0.9, 0.5, 0.4)), ((None, None, 0.7), (None, None, -1.0)),
    ],
)  # fmt: skip
def test_it_decides_what_the_filters_would_have_decided(place: Path, context: Make, before: Any, after: Any) -> None:
    first, fresh = filtered(place, context, "first", *before), filtered(place, context, "fresh", *after)
    config = ReconsiderConfig(**dict(zip(("min_cosine", "max_nsfw", "min_score"), after, strict=True)))
    facts = reconsider(config, context(place, "reconsidered", rows=first))
    found, wanted = read_manifest(place / "reconsidered"), read_manifest(place / fresh)
    names = ["row_id", "decision", "reasons", "keeper_id", "semantic_score"]
    assert [[row.get(name) for name in names] for row in found] == [[row.get(name) for name in names] for row in wanted]
    assert facts["received"] == COUNT == facts["kept"] + facts["errored"] + sum(facts["dropped"].values())
    was = {row["row_id"]: row["decision"] for row in read_manifest(place / first)}
    assert facts["changed"] == sum(row["decision"] != was[row["row_id"]] for row in found)
    assert (facts["changed"] > 0) == (before != after)


def test_a_row_without_the_score_of_a_later_filter_is_not_let_through(place: Path, context: Make) -> None:
    first = filtered(place, context, "first", 0.8, 0.9, 0.1)
    facts = reconsider(ReconsiderConfig(min_cosine=0.99, max_nsfw=1), context(place, "reconsidered", rows=first))
    was, found = ({row["row_id"]: row for row in read_manifest(place / name)} for name in (first, "reconsidered"))
    back = [row_id for row_id, row in found.items() if row["reasons"] == ["not_scored"]]
    assert facts["dropped"]["not_scored"] == len(back) > 3
    assert {was[row_id]["reasons"][0] for row_id in back} == {"semantic_duplicate", "unsafe"}
    assert found["r03"]["reasons"] == ["blurred"]
    assert found["r04"]["decision"] == "error"
    assert {row["nsfw_threshold"] for row in found.values()} == {1.0, None}
    with pytest.raises(DataRefused, match=r"cosines below 0\.99 were not stored"):  # as far as this manifest can tell
        reconsider(ReconsiderConfig(min_cosine=0.8), context(place, "again", rows="reconsidered"))


def test_what_was_not_scored_or_stored_is_refused(place: Path, context: Make) -> None:
    first = filtered(place, context, "first", 0.8, None, None)
    with pytest.raises(DataRefused, match="no scores of nsfw to compare with max_nsfw; run that filter before"):
        reconsider(ReconsiderConfig(max_nsfw=0.5), context(place, "a", rows=first))
    with pytest.raises(DataRefused, match=r"cosines below 0\.8 were not stored, so min_cosine=0\.7"):
        reconsider(ReconsiderConfig(min_cosine=0.7), context(place, "b", rows=first))
    with pytest.raises(ConfigError, match="reconsider.max_nsfw=0.5 needs scores of safety, which is null; set safety"):
        parse(DataConfig, {"reconsider": {"max_nsfw": 0.5}}, "it")


def test_rows_of_many_batches_are_all_decided(place: Path, context: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_curation.reconsider.BATCH", 7)
    first, fresh = (
        filtered(place, context, "first", 0.8, None, None),
        filtered(place, context, "fresh", 0.97, None, None),
    )
    reconsider(ReconsiderConfig(min_cosine=0.97), context(place, "reconsidered", rows=first))
    reasons = [[row["reasons"] for row in read_manifest(place / name)] for name in ("reconsidered", fresh)]
    assert reasons[0] == reasons[1]
    write_manifest([], place / "download")
    assert reconsider(ReconsiderConfig(), context(place, "empty", rows="download"))["received"] == 0

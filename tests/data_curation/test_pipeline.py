"""The curation end to end on a small demo web: real server, real img2dataset, real encoders."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_curation import web_server
from data_curation.agreement import SIDE, caption_fit
from data_curation.buckets import assign_buckets
from data_curation.config import BucketsConfig, DemoWebConfig, DownloadConfig, EncodeConfig, ListSource
from data_curation.dataset import TrainingSet
from data_curation.dedup import deduplicate
from data_curation.demo_web import publish_demo_web
from data_curation.download import download
from data_curation.encode import encode
from data_curation.filter_config import DedupConfig, QualityConfig
from data_curation.manifest import read_manifest
from data_curation.quality import filter_quality
from data_curation.scenes import all_scenes, draw, short_caption
from data_curation.sources import read_source
from infra.artifacts import folder_digest
from infra.errors import ConfigError, DataRefused
from infra.stages import StageContext

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory, context: Callable[..., StageContext]) -> Path:
    root = tmp_path_factory.mktemp("web")
    config = DemoWebConfig(rows=120, defect_share=0.5, longest_side=160)
    publish_demo_web(config, context(root, "source"))
    again = root / "again"
    again.mkdir()
    publish_demo_web(config, context(again, "source"))
    assert folder_digest(again / "source")[0] == folder_digest(root / "source")[0]
    return root


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    asked: list[str] = []
    answer = web_server._Handler.do_GET

    def counting(handler: web_server._Handler) -> None:
        asked.append(handler.path)
        answer(handler)

    monkeypatch.setattr(web_server._Handler, "do_GET", counting)
    yield asked


@pytest.mark.slow
def test_curation_of_a_small_web(web: Path, counted: list[str], context: Callable[..., StageContext]) -> None:
    config = DownloadConfig(shard_rows=50)
    facts = download(config, context(web, "download", source="source"))
    assert facts["received"] == 120 == facts["kept"] + facts["errored"] + sum(facts["dropped"].values())
    assert len(set(counted)) == 120
    whole = folder_digest(web / "download")[0]

    # killed after its first shard: the others are fetched again, the first is not
    (web / "download").rename(web / "kept")
    for shard in (1, 2):
        (web / "download.scratch" / f"rows-{shard:05d}.parquet").unlink()
    first = {row["url"].split("localhost")[1] for row in pq.read_table(web / "kept" / "rows-00000.parquet").to_pylist()}
    counted.clear()
    assert download(config, context(web, "download", source="source"))["shards_reused"] == 1
    assert not first & set(counted)
    assert folder_digest(web / "download")[0] == whole

    images = {"images": "download"}
    deduplicate(DedupConfig(), context(web, "dedup", rows="download"))
    filter_quality(QualityConfig(), context(web, "quality", rows="dedup", **images))
    facts = assign_buckets(BucketsConfig(), context(web, "buckets", rows="quality", truth="source"))
    assert facts["received"] == 120
    truth = facts["truth"]["defects"]
    for defect in truth.keys() - {"caption_mismatch", "near_duplicate"}:  # too few rows to judge captions
        assert truth[defect]["caught"] == truth[defect]["planted"]
    assert truth["near_duplicate"]["caught"] >= truth["near_duplicate"]["planted"] - 1
    assert facts["truth"]["sound_rows_lost"] <= 1

    facts = encode(EncodeConfig(), context(web, "encode", manifest="buckets", **images))
    data = TrainingSet.open(web / "encode")
    kept = [row for row in read_manifest(web / "buckets") if row["decision"] == "keep"]
    assert (facts["pictures"], data.captions[0]) == (len(kept), "")
    chosen = data.select((32, 40))
    for step in range(chosen.steps_per_epoch(4)):
        batch = chosen.batch(step, 4, seed=0)
        width, height = batch.bucket
        got = data.gather(batch)
        assert got.images.shape == (4, height, width, 3)
        channels = 40 if batch.bucket == (32, 32) else 0  # REPA reads only the first resolution
        assert got.teacher.shape == (4, height // 4, width // 4, channels)
        assert all(str(b) in data.captions[s] for s, b in zip(got.short, ["background"] * 4, strict=True))
    tokens, mask = data.text([0, int(got.long[0])])
    assert mask.sum(axis=1).tolist()[0] == 2  # CLS and SEP of the empty prompt
    assert tokens.shape == (*mask.shape, 384)
    assert not tokens[~mask].any()
    assert (data.std >= 1e-3).all()
    with pytest.raises(DataRefused, match="it has resolutions"):
        data.select((64,))


@pytest.mark.slow
def test_a_list_cannot_reach_this_machine(tmp_path: Path, web: Path, context: Callable[..., StageContext]) -> None:
    port = 8000
    listed = tmp_path / "urls.txt"
    listed.write_text(
        f"http://127.0.0.1:{port}/a.png\nhttp://localhost:{port}/b.png\nfile:///etc/hostname\n\nnonsense\n"
    )
    read_source(ListSource(path=listed), context(tmp_path, "source"))
    with pytest.raises(DataRefused, match="none of 4 rows gave a picture"):
        download(DownloadConfig(retries=0), context(tmp_path, "download", source="source"))
    rows = {row["url"]: row["reasons"] for row in read_manifest(tmp_path / "download")}
    assert rows[f"http://127.0.0.1:{port}/a.png"] == rows[f"http://localhost:{port}/b.png"] == ["refused_address"]
    assert rows["file:///etc/hostname"] == rows["nonsense"] == ["bad_url"]


def test_a_taken_port_is_named(web: Path) -> None:
    with web_server.serve(web / "source") as address:
        port = int(address.rsplit(":", 1)[1])
        with pytest.raises(ConfigError, match=f"port {port}"), web_server.serve(web / "source", port):
            pass


def test_changed_data_changes_the_key_and_is_refused_under_the_old_one(
    tmp_path: Path, context: Callable[..., StageContext]
) -> None:
    listed = tmp_path / "urls.txt"
    listed.write_text("http://example.org/a.png\n")
    before = ListSource(path=listed)
    listed.write_text("http://example.org/b.png\n")
    assert ListSource(path=listed).fingerprint != before.fingerprint
    assert ListSource.model_validate(before.model_dump(mode="json")) == before
    with pytest.raises(DataRefused, match="changed since"):
        read_source(before, context(tmp_path, "source"))


@pytest.mark.slow
def test_wrong_captions_stand_out() -> None:
    rng = np.random.default_rng(0)
    scenes = [s for s in all_scenes("basic") if s.layout in ("big", "three", "top left")] * 12
    pictures = np.stack([np.asarray(draw(s, 2 * SIDE, 2 * SIDE, rng).reduce(2)) for s in scenes])
    captions = [short_caption(s) for s in scenes]
    wrong = rng.choice(len(scenes), 25, replace=False)
    for i in wrong:
        captions[i] = short_caption(scenes[int(rng.integers(len(scenes)))])
    wrong = np.array([i for i in wrong if captions[i] != short_caption(scenes[i])])
    fit = caption_fit(pictures, captions)
    assert fit.explained > 0.5
    found = fit.gap > QualityConfig().max_caption_gap
    assert found[wrong].mean() > 0.9
    assert np.delete(found, wrong).mean() < 0.01
    shuffled = [captions[i] for i in rng.permutation(len(captions))]
    assert caption_fit(pictures, shuffled).explained < 0.1  # then the stage does not use it

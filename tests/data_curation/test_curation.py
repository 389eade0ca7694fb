"""The scenes, the sources and the training-set reader keep their promises."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_curation import scenes
from data_curation.config import FolderSource, ListSource
from data_curation.dataset import Selection
from data_curation.sources import read_source
from infra.errors import ConfigError, DataRefused


def test_held_out_scenes_are_a_tenth_and_captions_tell_scenes_apart() -> None:
    full, basic = scenes.all_scenes("full"), scenes.all_scenes("basic")
    assert (len(full), len(basic)) == (3648, 1296)
    assert 0.07 < sum(s.held_out for s in full) / len(full) < 0.13
    assert len({scenes.short_caption(s) for s in full}) == len(full)
    for variant in range(4):
        assert len({scenes.long_caption(s, variant) for s in full}) == len(full)


def test_drawing_is_a_function_of_the_seed() -> None:
    chosen = scenes.all_scenes("full")[::500]
    assert np.array_equal(scenes.draw_batch(chosen, 32, 1), scenes.draw_batch(chosen, 32, 1))
    assert not np.array_equal(scenes.draw_batch(chosen, 32, 1), scenes.draw_batch(chosen, 32, 2))


def context(tmp_path: Path) -> SimpleNamespace:
    (tmp_path / "out").mkdir()
    return SimpleNamespace(out=tmp_path / "out", inputs={})


def test_a_folder_becomes_rows_with_their_captions(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("red_ball", "other"):
        Image.new("RGB", (80, 80), "red").save(pictures / f"{name}.png")
    (pictures / "other.txt").write_text("a told caption\n")
    facts = read_source(FolderSource(path=pictures), context(tmp_path))
    rows = pq.read_table(tmp_path / "out" / "urls.parquet").to_pylist()
    assert facts == {"received": 2, "layout": "pairs", "without_caption": 0}
    assert [row["caption_short"] for row in rows] == ["a told caption", "red ball"]
    bodies = pq.read_table(tmp_path / "out" / "bodies" / "part-00000.parquet")
    assert bodies["row_id"].to_pylist() == [row["row_id"] for row in rows]
    assert bodies["body"][0].as_py() == (pictures / "other.png").read_bytes()


def test_a_url_list_is_read_and_bad_ones_are_refused(tmp_path: Path) -> None:
    listed = tmp_path / "urls.txt"
    listed.write_text("http://example.org/a,b.png\n\nhttp://example.org/c.png\n")
    ctx = context(tmp_path)
    assert read_source(ListSource(path=listed), ctx) == {"received": 2}
    assert pq.read_table(tmp_path / "out" / "urls.parquet")["url"][0].as_py() == "http://example.org/a,b.png"
    with pytest.raises(ConfigError, match="does not exist"):
        read_source(ListSource(path=tmp_path / "nothing.csv"), ctx)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataRefused, match="has no pictures or URLs"):
        read_source(FolderSource(path=tmp_path / "empty"), ctx)
    (tmp_path / "x.csv").write_text("address\nhttp://example.org/a.png\n")
    with pytest.raises(ConfigError, match="no column 'url'"):
        read_source(ListSource(path=tmp_path / "x.csv"), ctx)


def test_batches_are_a_function_of_the_step_and_an_epoch_sees_every_row() -> None:
    buckets = {(32, 32): np.arange(10), (48, 32): np.arange(10, 17)}
    first, second = (Selection(buckets, np.arange(17)) for _ in range(2))
    steps = first.steps_per_epoch(4)
    assert steps == 3 + 2
    batches = [first.batch(step, 4, seed=3) for step in range(steps)]
    assert set(np.concatenate([b.rows for b in batches]).tolist()) == set(range(17))
    late = second.batch(steps - 1, 4, seed=3)  # asked out of order, in another object
    assert late.bucket == batches[-1].bucket
    assert np.array_equal(late.rows, batches[-1].rows)
    assert any(not np.array_equal(first.batch(steps + i, 4, 3).rows, batches[i].rows) for i in range(steps))

"""Nights on a small real lifecycle: new pictures each night, one refused by the gate, one rolled back."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_curation.scenes import all_scenes, draw_batch, short_caption
from flows import nightly
from flows.config import LifecycleConfig
from infra.config import load_yaml, parse
from infra.embedded import prefect_server
from infra.errors import GateFailed
from infra.pointers import moves
from infra.storage import open_store

pytestmark = [pytest.mark.lifecycle, pytest.mark.prefect, pytest.mark.timeout(900)]
REPOSITORY = Path(__file__).parents[2]
SHORT = ["name=nights", "personalize=[]", "mix=[]", "distill=[]", "distill_pairs=[]", "compare=null",
         "evaluate.subjects=[]", "posttrain.grpo=null", "posttrain.dpo=null"]  # fmt: skip
SCENES = [scene for scene in all_scenes("basic") if not scene.held_out]


def t2i(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-m", "flows.cli", *map(str, arguments)], capture_output=True, text=True,
                          check=False, env=environment)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def add_pictures(folder: Path, night: int, count: int = 24) -> None:
    """What came in since yesterday: new scenes of that night, each with its caption."""
    folder.mkdir(exist_ok=True)
    scenes = SCENES[night * count : (night + 1) * count]
    for number, (scene, picture) in enumerate(zip(scenes, draw_batch(scenes, 128, night), strict=True)):
        Image.fromarray(picture).save(folder / f"night-{night}-{number:02}.png")
        (folder / f"night-{night}-{number:02}.txt").write_text(short_caption(scene))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A finished first lifecycle on a folder of pictures, and a Prefect server."""
    base = tmp_path_factory.mktemp("nights")
    add_pictures(base / "pictures", 0, 40)
    changes = [*SHORT, f"run.root={base / 'root'}", f"data.source={{kind: folder, path: {base / 'pictures'}}}"]
    preset = REPOSITORY / "presets" / "smoke.yaml"
    t2i("run", preset, *(part for each in changes for part in ("--set", each)))
    with prefect_server(base / "prefect"):
        yield base, lambda: parse(LifecycleConfig, load_yaml(preset, changes), "nights")


def night_of(place, number, **options):
    base, config = place
    add_pictures(base / "pictures", number)
    return nightly.nightly_flow(config=config(), steps=4, **options)


def test_three_nights_one_refused_one_rolled_back(place):
    base, config = place
    store = open_store(str(base / "root"))
    for number in (2, 3):
        record = night_of(place, number, max_loss=1.0)
        assert record["outcome"] == "ok"
        assert store.find("source", key_of(record, "source")).facts["received"] == 24
    assert len(champions(store)) == 3
    assert [len(each.beside["sets"]) for each in moves(store, "nights-champion")] == [1, 2, 3]

    before = champions(store)
    with pytest.raises(GateFailed, match="not promoted.*the model in use stays"):
        night_of(place, 4, max_loss=-1.0)  # it would have to be better by more than there is
    assert champions(store) == before  # the model in use stays
    assert moves(store, "nights-seen")[-1].run == store.read_run("latest")["run"]  # and those rows are not tried again

    add_copies(base / "pictures")
    quiet = nightly.nightly_flow(config=config(), max_loss=1.0)
    assert quiet["outcome"] == "ok"
    assert {stage["name"] for stage in quiet["stages"]}.isdisjoint({"nightly", "promoted"})
    dropped = store.find("dedup", key_of(quiet, "dedup")).facts["dropped"]
    assert dropped == {"known_before": 3}  # an old picture under a new name is known
    assert champions(store) == before

    again = json.loads(t2i("champion", "nights", "--rollback", "--root", base / "root", "--json"))
    assert again["digest"] == before[-2]
    assert champions(store) == [*before, before[-2]]
    shown = t2i("champion", "--root", base / "root")
    assert "rollback from generation 3 to 2" in shown


def add_copies(folder: Path) -> None:
    for number in range(3):
        picture = np.asarray(Image.open(folder / f"night-2-{number:02}.png"))
        Image.fromarray(picture).save(folder / f"again-{number}.png", compress_level=1)


def champions(store):
    return [each.artifact.digest for each in moves(store, "nights-champion")]


def key_of(record, stage):
    return next(each["key"] for each in record["stages"] if each["name"] == stage)


def test_the_watermark_holds_every_row_once(place):
    base, _ = place
    store = open_store(str(base / "root"))
    manifest = store.local(moves(store, "nights-seen")[-1].artifact) / "manifest.parquet"
    urls = pq.read_table(manifest, columns=["url"])["url"].to_pylist()
    assert len(urls) == len(set(urls)) == 40 + 3 * 24 + 3

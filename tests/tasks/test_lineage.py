"""Lineage back and impact forward on a small store with real manifests, an index and records."""

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_curation.encode import INDEX_SCHEMA
from data_curation.hashing import phash
from data_curation.manifest import write_manifest, write_table
from infra.artifacts import Artifact
from infra.errors import ConfigError, DataRefused
from infra.lineage import Graph
from infra.storage import Store, open_store
from tasks.impact import impact
from tasks.lineage import lineage, stamp, stamp_of, target, urls

WEB = "http://pictures.test"


def drawn(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).resize((192, 192), Image.Resampling.BICUBIC)


def png(picture: Image.Image, **options: object) -> bytes:
    out = io.BytesIO()
    picture.save(out, **{"format": "PNG", **options})
    return out.getvalue()


def row(number: int, **more: object) -> dict[str, object]:
    return {
        "row_id": f"r{number}", "url": f"{WEB}/{number}.png", "sha256_raw": f"{number}" * 64, "decision": "keep",
        "reasons": [], "licence": "CC0", "domain": "basic" if number < 3 else "extended", "split": "train",
        "phash": phash(png(drawn(number)), 16).tobytes().hex(), **more,
    }  # fmt: skip


ROWS = [
    row(0),
    row(1, decision="drop", reasons=["near_duplicate"], keeper_id="r0", dup_distance=3),
    row(2, split="validation"),
    row(3),
    row(4, decision="drop", reasons=["blurred"], phash=None),
]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "root")


@pytest.fixture
def graph(store: Store, tmp_path: Path) -> Graph:
    """source -> dedup -> encode -> pretrain (basic only) -> dpo (no pictures) and wide (all domains)."""

    def make(stage: str, kind: str, function: str, inputs: Mapping[str, Artifact], write: Callable[[Path], object], **config: object) -> Artifact:  # fmt: skip
        folder = tmp_path / f"out-{stage}"
        folder.mkdir()
        write(folder)
        facts = {"function": function, "config": config, "inputs": {r: a.digest for r, a in inputs.items()}}
        return store.commit(stage, stage.ljust(64, "0"), kind, folder, [a.digest for a in inputs.values()], facts)

    def note(folder: Path) -> None:
        (folder / "about.txt").write_text(folder.name)

    def index(folder: Path) -> None:
        rows = [
            {"row_id": r["row_id"], "resolution": 32, "domain": r["domain"], "split": r["split"]}
            for r in ROWS
            if r["decision"] == "keep"
        ]
        write_table(rows, INDEX_SCHEMA, folder / "index.parquet")

    source = make("source", "source", "read_list", {}, note)
    before = make("download", "manifest", "download", {"source": source}, lambda f: write_manifest(ROWS[:1], f))
    dedup = make("dedup", "manifest", "deduplicate", {"rows": before}, lambda f: write_manifest(ROWS, f))
    data = make("encode", "training-set", "encode", {"manifest": dedup, "images": before}, index)
    select = {"resolutions": [32], "domains": ["basic"]}
    first = make("pretrain", "checkpoint", "flow_matching", {"data": data}, note, select=select)
    make("dpo", "checkpoint", "dpo", {"data": data, "init": first}, note)
    make("wide", "checkpoint", "flow_matching", {"data": data}, note, select={"resolutions": [32], "domains": None})
    make("large", "checkpoint", "flow_matching", {"data": data}, note, select={"resolutions": [64]})
    stages = [{"name": a.stage, "digest": a.digest} for a in store.list()]
    store.write_run("toy", {"name": "toy", "stages": stages, "outcome": "ok"})
    return Graph(store.list())


def test_a_later_night_s_copy_leads_to_the_picture_kept_before(store: Store, graph: Graph, tmp_path: Path):
    """The next night drops a known picture, and remembers all rows: both must not hide what was trained on."""
    seen = next(a for a in store.list() if a.stage == "dedup")
    again = row(9, decision="drop", reasons=["known_before"], keeper_id="r0", dup_distance=0)

    def make(stage: str, function: str, inputs: Mapping[str, Artifact], rows: list) -> Artifact:
        folder = tmp_path / f"night-{stage}"
        folder.mkdir()
        write_manifest(rows, folder)
        facts = {"function": function, "inputs": {r: a.digest for r, a in inputs.items()}}
        return store.commit(stage, stage.ljust(64, "1"), "manifest", folder, [], facts)

    night = make("dedup", "deduplicate", {"known": seen}, [again])
    make("remembered", "remember", {"known": seen, "manifest": night}, [*ROWS, again])
    found = impact(store, Graph(store.list()), f"{WEB}/9.png")
    relations = {r["row_id"]: r["relation"] for r in found["rows"]}
    assert relations == {"r9": "is it", "r0": "kept in its place", "r1": "a copy of it"}
    assert affected(found) == {"pretrain": ["r0"], "wide": ["r0"], "dpo": "pretrain"}


def affected(found: dict) -> dict[str, list[str] | str]:
    return {a["stage"]: a["rows"] if a["trained"] else ",".join(a["made_from"]) for a in found["affected"]}


def test_a_checkpoint_knows_its_stages_and_every_url_it_trained_on(store: Store, graph: Graph):
    found = lineage(store, graph, target(store, graph, "dpo"))
    assert [step["stage"] for step in found["steps"]][-1] == "dpo"
    assert {step["stage"] for step in found["steps"]} == {"source", "download", "dedup", "encode", "pretrain", "dpo"}
    assert found["pictures"] == 1  # validation and extended rows were not selected
    table = urls(store, graph, target(store, graph, "dpo")).to_pylist()
    assert [(r["url"], r["stages"]) for r in table] == [(f"{WEB}/0.png", ["pretrain"])]
    assert urls(store, graph, target(store, graph, "wide"))["row_id"].to_pylist() == ["r0", "r3"]
    assert urls(store, graph, target(store, graph, "source")).num_rows == 0


def test_targets_by_picture_path_export_digest_and_stage(store: Store, graph: Graph, tmp_path: Path):
    made = target(store, graph, "pretrain")
    picture, export = tmp_path / "drawn.png", tmp_path / "export" / "unet"
    drawn(9).save(picture, pnginfo=stamp(made, prompt="a cat", seed=1))
    export.mkdir(parents=True)
    (export.parent / "lineage.json").write_text(json.dumps({"digest": made.digest}))
    assert stamp_of(picture) == {"digest": made.digest, "stage": "pretrain", "prompt": "a cat", "seed": 1}
    for name in (str(picture), str(export), str(store.local(made) / "about.txt"), made.digest[:12], "pretrain"):
        assert target(store, graph, name) == made, name
    plain = tmp_path / "plain.png"
    drawn(8).save(plain)
    for name in (str(plain), "nothing"):
        with pytest.raises(ConfigError, match="no picture that t2i drew"):
            target(store, graph, name)


def test_a_url_reaches_what_trained_on_it_and_what_was_made_from_that(store: Store, graph: Graph):
    found = impact(store, graph, f"{WEB}/0.png")
    assert [(r["row_id"], r["relation"]) for r in found["rows"]] == [("r0", "is it"), ("r1", "a copy of it")]
    assert affected(found) == {"pretrain": ["r0"], "wide": ["r0"], "dpo": "pretrain"}
    assert all(a["runs"] == ["toy"] for a in found["affected"])


def test_a_dropped_copy_leads_to_the_picture_kept_in_its_place(store: Store, graph: Graph):
    found = impact(store, graph, "1" * 64)
    assert [(r["row_id"], r["relation"]) for r in found["rows"]] == [("r1", "is it"), ("r0", "kept in its place")]
    assert affected(found)["pretrain"] == ["r0"]


@pytest.mark.parametrize(
    ("what", "rows"), [("r4", ["r4"]), (f"{WEB}/2.png", ["r2"]), ("http://elsewhere.test/x.png", [])]
)
def test_what_was_dropped_held_out_or_never_seen_reaches_nothing(store: Store, graph: Graph, what: str, rows: list):
    found = impact(store, graph, what)
    assert [r["row_id"] for r in found["rows"]] == rows
    assert found["affected"] == []


def test_a_file_saved_again_is_found_by_its_looks(store: Store, graph: Graph, tmp_path: Path):
    again = tmp_path / "again.jpg"
    again.write_bytes(png(drawn(3), format="JPEG", quality=92))
    found = impact(store, graph, str(again))
    assert [(r["row_id"], r["relation"]) for r in found["rows"]] == [("r3", "looks like it")]
    assert affected(found) == {"wide": ["r3"]}
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    with pytest.raises(DataRefused, match="is no picture that can be looked for"):
        impact(store, graph, str(broken))


def test_only_listed_files_are_read(store: Store, graph: Graph):
    data = next(a for a in store.list() if a.stage == "encode")
    assert pq.read_table(io.BytesIO(store.read(data, "index.parquet"))).num_rows == 3

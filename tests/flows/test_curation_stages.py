"""Every stage of curation at once, for two nights: the demo web, then a folder with something planted for every reason."""

import io
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors.numpy import save_file

from data_curation.config import CURATION, DataConfig
from data_curation.demo_web import Page, plan, render
from data_curation.embedders import embedder
from data_curation.filter_config import PackagedEmbedder
from data_curation.manifest import Row, read_manifest
from data_curation.scenes import all_scenes, draw_batch, short_caption
from flows.config import LifecycleConfig
from flows.dag import curation
from flows.nightly import nightly_flow
from infra.config import load_yaml, parse
from infra.embedded import prefect_server
from infra.storage import Store, open_store

pytestmark = [pytest.mark.lifecycle, pytest.mark.prefect, pytest.mark.timeout(900)]
REPOSITORY = Path(__file__).parents[2]
ROWS, MAX_WORDS, MIN_SIDE, MAX_NSFW = 400, 10, 100, 0.1
WEB = f"{{kind: demo_web, rows: {ROWS}, square_share: 0.7, defect_share: 0.3, shortest_side: 96, longest_side: 200, seed: 5}}"
SCENES = [s for s in all_scenes("basic") if not s.held_out and len(short_caption(s).split()) <= MAX_WORDS]
Found = dict[str, dict[str, Row]]  # stage -> row_id -> row


def changes(base: Path, source: str) -> list[str]:
    """Every stage of curation on."""
    evaluation = f"pictures: [{{path: {base / 'evaluation'}}}], prompts: [{{path: {base / 'prompts.txt'}}}]"
    return [
        f"data.source={source}", "data.quality={check_captions: false, max_border: 0.02, max_overlay: 22}",
        f"data.captions={{max_words: {MAX_WORDS}}}",
        f"data.redecide={{min_side: {MIN_SIDE}, max_border: 0.02, max_overlay: 22, captions: {{max_words: {MAX_WORDS}}}}}",
        "data.reconsider={}",
        f"data.decontaminate={{{evaluation}}}", "data.semantic={min_cosine: 0.95}", f"data.safety={{max_nsfw: {MAX_NSFW}}}",
        f"data.aesthetic={{head: {{path: {base / 'head.safetensors'}}}, min_score: -0.9}}",
        "data.recaption={rows: all}", "posttrain.dpo=null",
    ]  # fmt: skip


class Place:
    """Where both nights run, and what is looked for in their manifests."""

    def __init__(self, base: Path, short: tuple[str, ...]) -> None:
        self.base, self.root, self.short = base, base / "root", short
        sound = [page for page in plan(self.config(WEB).data.source) if page.defect is None]  # type: ignore[arg-type]
        copied = {page.origin.ordinal for page in plan(self.config(WEB).data.source) if page.origin}  # type: ignore[arg-type]
        self.sound = [page for page in sound if page.ordinal not in copied and min(page.width, page.height) >= MIN_SIDE]
        self.prompt = short_caption(SCENES[-1])
        (base / "prompts.txt").write_text(self.prompt + "\n")
        (base / "evaluation").mkdir()
        self.tested = [page for page in self.sound if short_caption(page.scene) != self.prompt][:2]
        dull = embedder(PackagedEmbedder())([grey()])  # the head likes least what looks like it
        save_file({"weight": -dull, "bias": np.zeros(1, np.float32)}, base / "head.safetensors")
        for page in self.tested:
            picture(page).save(base / "evaluation" / f"{page.ordinal}.png")

    def config(self, source: str) -> LifecycleConfig:
        settings = [*self.short, *changes(self.base, source), f"run.root={self.root}"]
        return parse(LifecycleConfig, load_yaml(REPOSITORY / "presets" / "smoke.yaml", settings), "stages")


def picture(page: Page) -> Image.Image:
    return Image.open(io.BytesIO(render([page])[0]["body"])).convert("RGB")


@pytest.fixture(scope="module")
def place(smoke: Any, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The demo web through a whole lifecycle with every stage of curation."""
    place = Place(tmp_path_factory.mktemp("stages"), smoke.short)
    done = subprocess.run(smoke.command(place.root, *changes(place.base, WEB)), capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": str(REPOSITORY)})  # fmt: skip
    smoke.finished(done)
    return place


def stages(record: dict[str, Any], store: Store, data: DataConfig) -> Iterator[tuple[str, dict[str, Any], Path]]:
    """Name, facts and folder of every stage of curation that has a manifest, in order."""
    keys = {stage["name"]: stage["key"] for stage in record["stages"]}
    for spec in curation(data):
        if spec.name not in ("source", "encode"):
            artifact = store.find(spec.name, keys[spec.name])
            assert artifact is not None
            yield spec.name, artifact.facts, store.local(artifact)


def manifests(record: dict[str, Any], place: Place, received: int) -> Found:
    """Rows of every stage; each has all of them, and says of each that left why."""
    data, found = place.config(WEB).data, Found()
    for name, facts, folder in stages(record, open_store(str(place.root)), data):
        rows = read_manifest(folder)
        decisions = Counter(row["decision"] for row in rows)
        assert facts["kept"] + sum(facts["dropped"].values()) + facts["errored"] == facts["received"] == received
        assert (decisions["keep"], decisions["error"], len(rows)) == (facts["kept"], facts["errored"], received)
        assert all(bool(row["reasons"]) == (row["decision"] != "keep") for row in rows), name
        found[name] = {row["row_id"]: row for row in rows}
    assert tuple(found) == CURATION
    return found


def left(found: Found, before: str, stage: str, reason: str) -> set[str]:
    """Rows that were kept before a stage and dropped there for a reason."""
    return {
        row_id
        for row_id, row in found[stage].items()
        if found[before][row_id]["decision"] == "keep" and row["decision"] == "drop" and reason in row["reasons"]
    }


def t2i(place: Place, *arguments: str) -> Any:
    done = subprocess.run([sys.executable, "-m", "flows.cli", *arguments, "--root", str(place.root), "--json"], text=True,
                          capture_output=True, check=False, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_the_demo_web_loses_what_is_planted_where_it_should(place: Place) -> None:
    record = open_store(str(place.root)).read_run("latest")
    found = manifests(record, place, ROWS)
    truth = record["truth"] if "truth" in record else t2i(place, "report")["truth"]
    for defect in ("exact_duplicate", "http_404", "corrupt", "truncated", "not_image", "oversize", "too_small"):
        assert truth["defects"][defect]["caught"] == truth["defects"][defect]["planted"] > 0, defect
    kept = {name: {row_id for row_id, row in rows.items() if row["decision"] == "keep"} for name, rows in found.items()}

    long = {row_id for row_id in kept["quality"] if found["captions"][row_id]["caption_words"] > MAX_WORDS}
    assert left(found, "quality", "captions", "caption_too_long") == long != set()
    rows = found["captions"]
    small = {row_id for row_id in kept["captions"] if min(rows[row_id]["width"], rows[row_id]["height"]) < MIN_SIDE}
    assert left(found, "captions", "redecide", "too_small") == small != set()

    asked = {row_id for row_id in kept["redecide"] if found["redecide"][row_id]["caption_short"] == place.prompt}
    shown = {page.row_id for page in place.tested} & kept["redecide"]
    assert shown
    assert asked | shown <= left(found, "redecide", "decontaminate", "in_evaluation")

    scored = [found["safety"][row_id]["nsfw"] for row_id in kept["semantic"]]
    assert left(found, "semantic", "safety", "unsafe") == {
        row_id for row_id, score in zip(kept["semantic"], scored, strict=True) if score > MAX_NSFW
    }
    assert record["funnel"]["kept"] == len(kept["buckets"]) > 20
    page = Path(record["report"]).read_text()
    assert all(reason in page for reason in record["funnel"]["dropped"])
    assert all(f">{stage}<" in page for stage in CURATION)  # a line of the funnel each
    assert {"caption_too_long", "in_evaluation", "too_small", "near_duplicate"} <= set(record["funnel"]["dropped"])


def test_lineage_and_impact_answer(place: Place) -> None:
    found = manifests(open_store(str(place.root)).read_run("latest"), place, ROWS)["buckets"]
    learnt = t2i(place, "lineage", "pretrain-40")
    assert {"download", "semantic", "safety", "aesthetic", "recaption", "buckets", "encode"} <= {
        s["stage"] for s in learnt["steps"]
    }
    train = [row for row in found.values() if row["decision"] == "keep" and row["split"] == "train"]
    assert 0 < learnt["pictures"] <= len(train)
    kept = next(row for row in train if row["buckets"])
    touched = {entry["stage"] for entry in t2i(place, "impact", kept["url"])["affected"]}
    assert {"pretrain-32", "report"} & touched
    tested = t2i(place, "impact", found[place.tested[0].row_id]["url"])
    assert [row["reasons"] for row in tested["rows"] if row["relation"] == "is it"] == [["in_evaluation"]]
    assert tested["affected"] == []
    copy = next(row for row in found.values() if row["reasons"] and row["reasons"][0] == "near_duplicate")
    related = {row["relation"] for row in t2i(place, "impact", copy["url"])["rows"]}
    assert {"is it", "kept in its place"} <= related


def plant(place: Place, folder: Path, known: list[Page]) -> dict[str, str]:
    """A night's folder: sound drawings, and a file for every reason. File -> reason."""
    folder.mkdir()
    said = [(scene, short_caption(scene)) for scene in SCENES[:30]]
    drawn = [Image.fromarray(image) for image in draw_batch([scene for scene, _ in said], 160, 77)]

    def add(name: str, image: Image.Image, caption: str, **options: Any) -> None:
        image.save(folder / name, **options)
        (folder / name).with_suffix(".json").write_text(json.dumps({"caption": caption, "tags": "drawing, emoji"}))

    for number in range(20):
        add(f"sound-{number:02}.png", drawn[number], said[number][1])
    caption = said[20][1]
    add("file-name.png", drawn[20], "IMG_1234.jpg")
    add("markup.png", drawn[21], "a drawing, see <b>more</b> at http://example.org")
    add("long.png", drawn[22], "a cat and " * MAX_WORDS)
    add("small.png", drawn[23].resize((128, MIN_SIDE - 8)), caption)
    add("framed.png", ImageOps.expand(drawn[24].resize((136, 136)), 12, "#a01060"), caption)
    told = drawn[25].resize((180, 150))
    ImageDraw.Draw(told).text((8, 120), "www.example-shop.com", fill="yellow", stroke_fill="black", stroke_width=1,
                              font=ImageFont.load_default(16))  # fmt: skip
    add("text.png", told, caption)
    add("asked.png", drawn[26], place.prompt)
    add("shown.jpg", picture(place.tested[0]), caption, quality=80)
    add("mirrored.png", ImageOps.mirror(drawn[3].resize((150, 150))), caption)
    add("skin.png", skin(), "tones of skin, nothing else")
    add("grey.png", grey(), "shades of grey, nothing else")
    add("again.jpg", picture(known[0]), caption, quality=75)
    (folder / "same.png").write_bytes(render([known[1]])[0]["body"])
    (folder / "broken.jpg").write_bytes((folder / "again.jpg").read_bytes()[:700])
    return {
        "file-name.png": "caption_file_name", "markup.png": "caption_markup", "long.png": "caption_too_long",
        "small.png": "too_small", "framed.png": "bordered", "text.png": "text_overlay", "asked.png": "in_evaluation",
        "shown.jpg": "in_evaluation", "mirrored.png": "semantic_duplicate", "skin.png": "unsafe",
        "grey.png": "unaesthetic",
        "again.jpg": "near_duplicate", "same.png": "exact_duplicate", "broken.jpg": "truncated",
    }  # fmt: skip


def skin() -> Image.Image:
    """Nothing but tones of skin, which the model of nudity scores higher than any drawing of the demo."""
    return shaded((224, 172, 140), 2)


def grey() -> Image.Image:
    return shaded((128, 128, 128), 9)


def shaded(colour: tuple[int, int, int], waves: float) -> Image.Image:
    y, x = np.mgrid[-1:1:160j, -1:1:160j]
    shade = 30 * np.cos(waves * x + y) + np.random.default_rng(1).normal(0, 4, (160, 160))
    return Image.fromarray((np.array(colour) + shade[..., None]).clip(0, 255).astype(np.uint8))


def test_another_night_meets_every_reason_and_everything_seen_before(place: Place, tmp_path: Path) -> None:
    store = open_store(str(place.root))
    first = manifests(store.read_run("latest"), place, ROWS)["buckets"]
    known = [page for page in place.sound if page not in place.tested and first[page.row_id]["decision"] == "keep"][:2]
    expected = plant(place, tmp_path / "night", known)
    received = 20 + len(expected)
    with prefect_server(tmp_path / "prefect"):
        record = nightly_flow(
            config=place.config(f"{{kind: folder, path: {tmp_path / 'night'}}}"), steps=2, max_loss=1.0
        )
    found = manifests(record, place, received)
    last = {row["url"].rsplit("/", 1)[-1].removeprefix("local:"): row for row in found["buckets"].values()}
    assert {name: (last[name]["reasons"] or [None])[0] for name in expected} == expected
    for name, page in (("again.jpg", known[0]), ("same.png", known[1])):
        assert last[name]["keeper_id"] == page.row_id
        assert last[name]["keeper_origin"] is not None
    assert last["mirrored.png"]["keeper_id"] == last["sound-03.png"]["row_id"]
    sound = [row for name, row in last.items() if name.startswith("sound")]
    assert sum(row["decision"] == "keep" for row in sound) >= 17
    kept = [row for row in sound if row["decision"] == "keep"]
    assert {row["caption_long_model"] for row in kept} == {"composed 1"}
    assert all("Tags: drawing, emoji" in row["caption_long"] for row in kept)
    again = t2i(place, "impact", str(tmp_path / "night" / "again.jpg"))
    assert "kept in its place" in {row["relation"] for row in again["rows"]}
    assert "pretrain-40" in {entry["stage"] for entry in again["affected"]}

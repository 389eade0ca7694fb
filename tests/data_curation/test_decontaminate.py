"""What a model is tested on does not reach its training set: pictures as copies, prompts by their n-grams."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from data_curation.decontaminate import PromptIndex, decontaminate, words_of
from data_curation.filter_config import DecontaminateConfig, EvaluationPictures, PromptList
from data_curation.manifest import ROWS_SCHEMA, Row, read_manifest, write_table
from data_curation.scenes import Scene, all_scenes, draw, long_caption, short_caption
from infra.errors import ConfigError, DataRefused
from infra.stages import StageContext

Make = Callable[..., StageContext]


def drawn(name: str, seed: int = 0) -> Image.Image:
    return draw(Scene("big", (name,), "blue"), 160, 160, np.random.default_rng(seed))


def encoded(picture: Image.Image, quality: int = 90) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return file.getvalue()


def row(row_id: str, body: bytes, caption: str = "", long: str = "") -> Row:
    import hashlib

    return {"row_id": row_id, "image": body, "sha256_raw": hashlib.sha256(body).hexdigest(), "width": 160,
            "height": 160, "num_bytes": len(body), "caption_short": caption, "caption_long": long,
            "decision": "keep", "reasons": []}  # fmt: skip


def ran(root: Path, context: Make, rows: list[Row], **config: Any) -> tuple[dict[str, Any], dict[str, Row]]:
    (root / "download").mkdir()
    write_table(rows, ROWS_SCHEMA, root / "download" / "rows-00000.parquet")
    facts = decontaminate(DecontaminateConfig(**config), context(root, "out", rows="download", images="download"))
    assert facts["received"] == len(rows) == facts["kept"] + facts["errored"] + sum(facts["dropped"].values())
    return facts, {found["row_id"]: found for found in read_manifest(root / "out")}


def test_copies_of_evaluation_pictures_leave(tmp_path: Path, context: Make) -> None:
    (tmp_path / "eval").mkdir()
    cat, car = encoded(drawn("cat")), encoded(drawn("car"))
    (tmp_path / "eval" / "cat.jpg").write_bytes(cat)
    (tmp_path / "eval" / "car.jpg").write_bytes(car)
    brighter = ImageEnhance.Brightness(drawn("car")).enhance(1.1)
    rows = [row("same", cat), row("near", encoded(brighter, 60)), row("again", encoded(drawn("cat", 7))),
            row("other", encoded(drawn("bell")))]  # fmt: skip
    facts, found = ran(tmp_path, context, rows, pictures=[EvaluationPictures(path=tmp_path / "eval")])
    assert [found[k]["reasons"] for k in ("same", "near", "again", "other")] == [
        ["in_evaluation"], ["in_evaluation"], [], [],
    ]  # fmt: skip
    assert (found["same"]["keeper_id"], found["near"]["keeper_id"]) == ("local:cat.jpg", "local:car.jpg")
    assert found["same"]["keeper_origin"] == str(tmp_path / "eval")
    assert (facts["evaluation_pictures"], facts["pictures_in_evaluation"]) == (2, 2)


def test_words_have_one_spelling() -> None:
    assert words_of("A  Café—“Straße”, ﬁne!") == words_of("a café strasse fine")


def test_overlap_is_the_largest_share_of_a_prompts_ngrams() -> None:
    index = PromptIndex(["one two three four five six", "Red ball!", "", "..."], 3)
    assert len(index.prompts) == 2
    assert index.overlap("zero ONE two, three four") == (0.5, "one two three four five six")
    assert index.overlap("a big red  ball lies here") == (1.0, "Red ball!")
    assert index.overlap("ball red") == (0.0, "")
    assert index.overlap("") == (0.0, "")


def test_captions_that_are_evaluation_prompts_leave(tmp_path: Path, context: Make) -> None:
    (tmp_path / "prompts.txt").write_text("A dog that rides a red bicycle\nred ball\n")
    body = encoded(drawn("cat"))
    rows = [row("said", body, "photo: a dog that rides a RED bicycle."), row("part", body, "a dog that rides a horse"),
            row("long", body, "a picture", "There is a red ball."), row("none", body)]  # fmt: skip
    facts, found = ran(tmp_path, context, rows, prompts=[PromptList(path=tmp_path / "prompts.txt")])
    assert [found[k]["decision"] for k in ("said", "part", "long", "none")] == ["drop", "keep", "drop", "keep"]
    assert round(found["part"]["eval_overlap"], 4) == round(1 / 3, 4)
    assert found["long"]["eval_match"] == "red ball"
    assert facts["dropped"] == {"in_evaluation": 2}


def test_held_out_scenes_are_found_in_every_wording_and_published_short_captions_are_not_taken_for_them() -> None:
    scenes = all_scenes("full")
    held_out = [scene for scene in scenes if scene.held_out]
    index = PromptIndex(
        [text for s in held_out for text in (short_caption(s), *(long_caption(s, i) for i in range(4)))], 5
    )
    assert all(index.overlap(long_caption(scene, i % 4))[0] == 1 for i, scene in enumerate(held_out))
    assert max(index.overlap(short_caption(scene))[0] for scene in scenes if not scene.held_out) < 0.8


def test_bad_settings_say_what_to_do(tmp_path: Path, context: Make) -> None:
    rows = [row("a", encoded(drawn("cat")))]
    with pytest.raises(ConfigError, match="has no pictures, prompts or held_out_scenes"):
        ran(tmp_path, context, rows)
    (tmp_path / "x.csv").write_text("text\nx\n")
    for number, (settings, words) in enumerate({
        "x.csv": "has no column 'prompt', only .*set column", "y.csv": "does not exist; give a file of prompts",
    }.items()):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            (tmp_path / str(number)).mkdir()
            ran(tmp_path / str(number), context, rows, prompts=[PromptList(path=tmp_path / settings)])
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "a.png").write_bytes(b"no picture")
    (tmp_path / "2").mkdir()
    with pytest.raises(DataRefused, match=r"a\.png in .*repair it or take it out"):
        ran(tmp_path / "2", context, rows, pictures=[EvaluationPictures(path=tmp_path / "eval")])

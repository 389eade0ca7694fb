"""Captions are judged by rules with stored scores, and other thresholds give what the stage would have given."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_curation.captions import REASONS, failed, filter_captions, language, scores
from data_curation.filter_config import CaptionsConfig, CaptionThresholds, RedecideConfig
from data_curation.manifest import Row, read_manifest, write_manifest
from data_curation.redecide import redecide_file
from data_curation.scenes import all_scenes, long_caption, short_caption
from infra.config import versioned
from infra.errors import DataRefused
from infra.stages import StageContext

JUNK = {
    "IMG_1234.jpg": "caption_file_name", "DSC 00123": "caption_file_name", "my-holiday-photo.png": "caption_file_name",
    "1234-5678": "caption_file_name", "d41d8cd98f00b204e9800998ecf8427e": "caption_file_name", "": "caption_too_short",
    "ball": "caption_too_short", "image of": "caption_filler", "Untitled image": "caption_filler",
    "No description available": "caption_filler", "click here to enlarge image": "caption_filler",
    "buy cheap shoes buy cheap shoes buy cheap shoes": "caption_repetitive",
    "see more at https://shop.example/x": "caption_markup", "<b>a dog</b> on grass": "caption_markup",
    "fish &amp; chips on a plate": "caption_markup", "write to me@example.org for prints": "caption_markup",
    "word " * 301: "caption_too_long",
}  # fmt: skip
SOUND = (
    "image of a red ball in the snow", "two cats side by side", "a photo of the author at work", "Rock & roll at 5 o'clock",
    "Ein Hund läuft über die Wiese", "猫が寝ている そして犬", "the dog and the cat and the bird in the garden", "a < b and c > d",
)  # fmt: skip


def reasons(caption: str, **settings: Any) -> list[str]:
    import numpy as np

    columns = {name: np.array([value]) for name, value in scores(caption).items()}
    return [REASONS[i] for i in np.flatnonzero(failed(columns, CaptionThresholds(**settings))[0])]


@pytest.mark.parametrize("caption", JUNK)
def test_junk_has_its_reason(caption: str) -> None:
    assert JUNK[caption] in reasons(caption)


@pytest.mark.parametrize("caption", SOUND)
def test_sound_captions_pass(caption: str) -> None:
    assert reasons(caption) == []


def test_captions_of_the_demo_break_no_rule() -> None:
    texts = {
        text
        for scene in all_scenes("full")[::4]
        for text in (short_caption(scene), *(long_caption(scene, i) for i in range(4)))
    }
    assert [text for text in texts if reasons(text, languages=("en",))] == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a cat in the garden", "en"), ("die Katze und der Hund im Garten", "de"), ("le chat et les chiens dans une rue", "fr"),
        ("el gato y los perros en una calle", "es"), ("il gatto nella strada con gli amici", "it"), ("кот в саду", "cyrillic"),
        ("o gato com os cães em uma rua", "pt"), ("de kat en het huis van een vriend", "nl"), ("花園裡的貓", "cjk"),
        ("庭にいる猫", "hiragana"), ("정원의 고양이", "hangul"), ("قطة في الحديقة", "arabic"), ("red ball", "und"), ("123", "und"),
    ],
)  # fmt: skip
def test_language(text: str, found: str) -> None:
    assert language(text, text.split()) == found
    assert ("caption_language" in reasons(text, languages=("en",), min_words=0)) == (found not in ("en", "und"))


def row(number: int, caption: str, **more: Any) -> Row:
    return {"row_id": f"{number:03d}", "caption_short": caption, "decision": "keep", "reasons": [], "width": 99,
            "height": 99, "blur": 0.1, "contrast": 9.0} | more  # fmt: skip


def test_redecide_gives_what_the_stage_gives(tmp_path: Path, context: Callable[..., StageContext]) -> None:
    rows = [row(i, caption) for i, caption in enumerate((*JUNK, *SOUND))]
    rows.append(row(900, "IMG_1.jpg", decision="drop", reasons=["blurred"], blur=0.7))
    rows.append(row(901, "a cat in the garden", decision="drop", reasons=["blurred"], blur=0.7))
    rows.append(row(902, "IMG_1.jpg", decision="drop", reasons=["near_duplicate"], blur=None))
    (tmp_path / "quality").mkdir()
    write_manifest(rows, tmp_path / "quality")
    lenient = {"max_repeated": 0.8, "max_markup": 3, "min_words": 1, "languages": ["en", "de"]}
    facts = filter_captions(CaptionsConfig(), context(tmp_path, "strict", rows="quality"))
    assert facts["kept"] == len(SOUND)
    assert facts["received"] == len(rows) == facts["kept"] + facts["errored"] + sum(facts["dropped"].values())
    filter_captions(CaptionsConfig(**lenient), context(tmp_path, "lenient", rows="quality"))
    strict, wanted = ({row["row_id"]: row for row in read_manifest(tmp_path / n)} for n in ("strict", "lenient"))
    assert strict["900"]["reasons"] == ["blurred", "caption_file_name"]
    assert strict["902"]["reasons"] == ["near_duplicate"]
    config = RedecideConfig(captions=CaptionThresholds(**lenient))
    redecide_file(tmp_path / "strict" / "manifest.parquet", tmp_path / "manifest.parquet", config, config.captions)
    found = {row["row_id"]: row for row in read_manifest(tmp_path)}
    assert {k: (r["decision"], r["reasons"]) for k, r in found.items()} == {
        k: (r["decision"], r["reasons"]) for k, r in wanted.items()
    }
    assert found != strict
    sharp = RedecideConfig(max_blur=0.9)  # only the blurred one with a sound caption comes back
    redecide_file(tmp_path / "strict" / "manifest.parquet", tmp_path / "manifest.parquet", sharp)
    found = {row["row_id"]: row["decision"] for row in read_manifest(tmp_path)}
    assert (found["900"], found["901"], found["902"]) == ("drop", "keep", "drop")
    with pytest.raises(DataRefused, match=r"has no columns \['caption_.*manifest of the quality or captions stage"):
        redecide_file(tmp_path / "quality" / "manifest.parquet", tmp_path / "x.parquet", config, config.captions)


def test_the_key_of_a_redecision_without_captions_is_what_it_was() -> None:
    assert "captions" not in versioned(RedecideConfig())
    assert "captions" in versioned(RedecideConfig(captions=CaptionThresholds()))

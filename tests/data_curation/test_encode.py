"""Encoding: the same bytes whatever was kept of earlier runs, and only what is new is encoded."""

import io
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_curation import encode_shards
from data_curation.config import EncodeConfig
from data_curation.encode import encode
from data_curation.encoders import TEXT_BATCH, crop_box, cut_texts, encode_texts, filled, teacher_features
from data_curation.manifest import ROWS_SCHEMA, Row, write_manifest, write_table
from infra.artifacts import folder_digest
from infra.stages import StageContext

COLOURS = ("red", "green", "blue", "grey", "white")


def rows(count: int, start: int = 0) -> list[Row]:
    """Pictures of noise in two shapes; long and short captions of several lengths, some said twice."""
    found = []
    for i in range(start, start + count):
        draw, stored = np.random.default_rng(i), io.BytesIO()
        wide = i % 3 == 0
        Image.fromarray(draw.integers(0, 256, (60, 90 if wide else 60, 3), np.uint8)).save(stored, "PNG")
        said = " ".join(COLOURS[: 1 + i % 5])
        found.append({
            "row_id": f"{i:04}", "url": f"http://x.invalid/{i}", "caption_short": said, "caption_long": f"{said} on {i}",
            "image": stored.getvalue(), "sha256_stored": f"{i:064}", "width": 90 if wide else 60, "height": 60,
            "decision": "keep", "reasons": [], "domain": "basic", "split": "train",
            "buckets": ["40:48x32"] if wide else ["32:32x32", "40:40x40"],
        })  # fmt: skip
    return found


@pytest.fixture
def encoded(tmp_path: Path, context: Callable[..., StageContext]) -> Callable[..., tuple[str, dict[str, int]]]:
    """Encode rows in shards of so many; the digest of what was written, and how many arrays were encoded for it."""
    number = iter(range(99))

    def run(made: list[Row], root: Path | None, per_shard: int = 10, **settings: object) -> tuple[str, dict[str, int]]:
        place = tmp_path / f"run-{next(number)}"
        for name in ("images", "manifest"):
            (place / name).mkdir(parents=True)
        for at in range(0, len(made), per_shard):
            write_table(made[at : at + per_shard], ROWS_SCHEMA, place / "images" / f"rows-{at:05}.parquet")
        write_manifest([{k: v for k, v in row.items() if k != "image"} for row in made], place / "manifest")
        ctx = replace(context(place, "encode", manifest="manifest", images="images"), root=root and str(root))
        facts = encode(EncodeConfig(**settings), ctx)
        counts = {name: facts[f"{name}_encoded"] for name in ("captions", "pixels", "teacher")}
        return folder_digest(ctx.out)[0], counts

    return run


def test_cold_warm_and_half_filled_give_the_same_bytes_and_only_new_things_are_encoded(encoded, tmp_path: Path) -> None:
    made, root = rows(24), tmp_path / "root"
    nothing_kept, all_new = encoded(made, None)
    assert all_new == {"captions": 30, "pixels": 40, "teacher": 16}
    _, half = encoded(rows(13), root)  # another night saw some of it
    assert half["pixels"] < all_new["pixels"]
    filled_up, rest = encoded(made, root)
    assert {name: half[name] + rest[name] for name in rest} == all_new
    warm, none = encoded(made, root)
    assert none == {"captions": 0, "pixels": 0, "teacher": 0}
    assert nothing_kept == filled_up == warm


def test_other_texts_leave_pictures_alone_and_other_pictures_texts(encoded, tmp_path: Path) -> None:
    made, root = rows(6), tmp_path / "root"
    encoded(made, root)
    assert encoded(made, root, max_tokens=8)[1] == {"captions": 12, "pixels": 0, "teacher": 0}
    assert encoded(made, root, teacher_resolutions=(32, 40))[1] == {"captions": 0, "pixels": 0, "teacher": 6}
    recaptioned = [row | {"caption_long": f"{row['caption_long']} again"} for row in made]
    assert encoded(recaptioned, root)[1] == {"captions": 6, "pixels": 0, "teacher": 0}
    moved = [row | {"buckets": ["40:40x40"]} for row in made]
    assert encoded(moved, root)[1] == {"captions": 0, "pixels": 2, "teacher": 0}


def test_a_killed_encode_goes_on_where_it_was(encoded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, root, real, calls = rows(24), tmp_path / "root", encode_shards.teacher_features, list[int]()

    def dies_at_the_third_shard(pixels: np.ndarray) -> np.ndarray:
        calls.append(len(pixels))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(pixels)

    monkeypatch.setattr(encode_shards, "teacher_features", dies_at_the_third_shard)
    with pytest.raises(KeyboardInterrupt):
        encoded(made, root)
    again, counts = encoded(made, root)
    assert counts == {"captions": 0, "pixels": 7, "teacher": 3}  # the third shard's four rows
    assert again == encoded(made, None)[0]


def test_flipped_bits_in_what_is_kept_change_nothing(encoded, tmp_path: Path) -> None:
    made, root, draw = rows(6), tmp_path / "root", random.Random(0)
    sound, counts = encoded(made, root)
    kept = [path for path in sorted(root.rglob("*")) if path.suffix in (".parquet", ".keys")]
    assert len(kept) == 6
    for path in kept:
        damaged = bytearray(path.read_bytes())
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
    assert encoded(made, root) == (sound, counts)
    assert encoded(made, root) == (sound, dict.fromkeys(counts, 0))


def test_features_of_an_item_do_not_depend_on_its_company() -> None:
    texts = [" ".join((*COLOURS[: 1 + i % 5], str(i))) for i in range(30)]
    together = encode_texts(texts, 64)
    for i in (0, 7, 29):
        alone = encode_texts([texts[i]], 64)[0]
        assert np.array_equal(alone, together[i])
    pixels = np.random.default_rng(0).integers(0, 256, (21, 64, 64, 3), np.uint8)
    whole = teacher_features(pixels)
    assert np.array_equal(teacher_features(pixels[20:]), whole[20:])
    assert np.array_equal(teacher_features(pixels[3:9]), whole[3:9])
    assert whole.shape == (21, 8, 8, 40)


def test_texts_are_those_of_the_model_and_are_cut_at_the_limit() -> None:
    long = " ".join(COLOURS * 9)
    assert [len(states) for states in encode_texts([long, "", "red"], 16)] == [16, 2, 3]
    assert len(filled(range(TEXT_BATCH + 1), TEXT_BATCH)) == 2
    assert filled([5, 6, 7], 2) == [([5, 6], [5, 6]), ([7], [7, 7])]


def test_captions_that_are_cut_are_counted_and_told(encoded, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`a a a a a a` has eight tokens with the two at its ends, and one word more has nine; what is kept already counts too."""
    said = ["a " * count for count in (6, 7, 8)]
    made = [row | {"caption_short": text, "caption_long": text} for row, text in zip(rows(3), said, strict=True)]
    for _ in range(2):
        caplog.clear()
        encoded(made, tmp_path / "root", max_tokens=8)
        assert "2 of 4 captions have more than max_tokens=8 tokens and were cut; raise data.encode" in caplog.text
    caplog.clear()
    encoded(made, tmp_path / "root", max_tokens=10)
    assert "were cut" not in caplog.text
    states = encode_texts(said, 8)
    assert cut_texts(said, states, 8) == 2


def test_the_crop_is_the_greatest_of_its_shape_in_the_middle() -> None:
    assert crop_box(90, 60, 32, 32) == (15, 0, 75, 60)
    assert crop_box(60, 90, 48, 32) == (0, 25, 60, 65)

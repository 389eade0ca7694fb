"""Copies are found and named; the same motif drawn again is not a copy."""

import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from data_curation.dedup import drop_covered, drop_exact
from data_curation.manifest import DROP, KEEP, Row
from data_curation.registration import register, thumbnail
from data_curation.scenes import Scene, draw

SCENE = Scene("beside", ("cat", "apple"), "green")


def drawn(seed: int) -> Image.Image:
    return draw(SCENE, 200, 160, np.random.default_rng(seed))


def saved_again(picture: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file)


COPIES = {
    "saved again": lambda picture: saved_again(picture, 60),
    "smaller": lambda picture: picture.resize((150, 120), Image.Resampling.BICUBIC),
    "cropped": lambda picture: picture.crop((3, 1, 197, 158)),
    "brighter": lambda picture: ImageEnhance.Brightness(picture).enhance(1.1),
}


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_becomes_equal_once_registered(kind: str) -> None:
    pairs = [(drawn(seed), COPIES[kind](drawn(seed))) for seed in range(4)]
    found = register(*(np.stack([thumbnail(pair[k]) for pair in pairs]) for k in (0, 1)))
    assert (found.relative < 0.15).all()
    assert (found.tint < 2).all()


def test_the_same_motif_drawn_again_stays_different() -> None:
    first = np.stack([thumbnail(drawn(seed)) for seed in range(10)])
    second = np.stack([thumbnail(drawn(seed + 100)) for seed in range(10)])
    assert (register(first, second).relative > 0.25).all()


def rows(number: int) -> list[Row]:
    return [{"row_id": f"r{i}", "sha256_raw": str(i), "decision": KEEP, "reasons": []} for i in range(number)]


def test_a_chain_of_small_changes_is_not_one_group() -> None:
    chain = rows(5)  # each near the next only
    drop_covered(chain, np.arange(4), np.arange(1, 5), np.full(4, 3))
    assert [row["decision"] for row in chain] == [KEEP, DROP, KEEP, DROP, KEEP]
    assert (chain[1]["keeper_id"], chain[1]["dup_distance"]) == ("r0", 3)


def test_the_same_bytes_keep_the_first_row() -> None:
    same = rows(3)
    same[2]["sha256_raw"] = same[0]["sha256_raw"]
    drop_exact(same)
    assert [row["decision"] for row in same] == [KEEP, KEEP, DROP]
    assert same[2]["keeper_id"] == "r0"

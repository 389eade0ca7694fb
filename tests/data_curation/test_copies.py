"""Copies are found and named; the same motif drawn again is not a copy."""

import io

import imagehash
import numpy as np
import pytest
from PIL import Image, ImageEnhance

from data_curation.copies import confirmed
from data_curation.dedup import drop_covered, drop_exact
from data_curation.filter_config import DedupConfig
from data_curation.manifest import DROP, KEEP, Row
from data_curation.registration import thumbnail
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


def are_copies(pairs: list[tuple[Image.Image, Image.Image]]) -> np.ndarray:
    first, second = np.arange(len(pairs)), np.arange(len(pairs)) + len(pairs)
    pictures = [a for a, _ in pairs] + [b for _, b in pairs]
    hashes = [imagehash.phash(picture, hash_size=16) for picture in pictures]
    distance = np.array([hashes[i] - hashes[j] for i, j in zip(first, second, strict=True)])
    thumbnails = {str(i): thumbnail(picture) for i, picture in enumerate(pictures)}
    config = DedupConfig()
    copies = confirmed(list(thumbnails), thumbnails, first, second, distance, config)
    return copies & (distance <= config.max_distance)


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_is_confirmed(kind: str) -> None:
    assert are_copies([(drawn(seed), COPIES[kind](drawn(seed))) for seed in range(4)]).all()


def test_the_same_motif_drawn_again_is_not_a_copy() -> None:
    assert not are_copies([(drawn(seed), drawn(seed + 100)) for seed in range(10)]).any()


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

import io

import imagehash
import numpy as np
import pytest
from PIL import Image

from data_curation.hashing import phash
from data_curation.scenes import Scene, draw_batch

SCENES = [Scene("big", (name,), "white") for name in ("fish", "apple", "rocket")]


def body(picture: np.ndarray, form: str) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture).save(out, form, quality=90)
    return out.getvalue()


def bits(value: np.ndarray) -> np.ndarray:
    return np.unpackbits(value)


@pytest.fixture(scope="module")
def drawn() -> np.ndarray:
    return draw_batch(SCENES, 512, 0)


def test_a_png_has_imagehash_s_own_hash(drawn: np.ndarray) -> None:
    stored = body(drawn[0], "PNG")
    expected = imagehash.phash(Image.open(io.BytesIO(stored)), hash_size=16).hash.ravel()
    np.testing.assert_array_equal(bits(phash(stored, 16)), expected)


def test_a_jpeg_decoded_small_keeps_nearly_all_bits_and_others_stay_far(drawn: np.ndarray) -> None:
    found = [bits(phash(body(picture, "JPEG"), 16)) for picture in drawn]
    for picture, own in zip(drawn, found, strict=True):
        full = imagehash.phash(Image.open(io.BytesIO(body(picture, "JPEG"))), hash_size=16).hash.ravel()
        assert (own != full).sum() <= 12
    assert (found[0] != found[1]).sum() > 60
    assert (found[1] != found[2]).sum() > 60

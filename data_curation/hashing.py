"""Perceptual hash of a stored picture: imagehash's phash on pixels that are cheap to get.

A JPEG is decoded at a half, a quarter or an eighth of its size, brightness only (libjpeg's scaled DCT), as long as twice
the hash's own raster remains. A few bits differ from the hash of the full picture, so hashes carry this version's name.
"""

from __future__ import annotations

import io

import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_curation.decode import STORED_AS_IS

VERSION = "imagehash-phash-draft-1"
RASTER = 4  # phash shrinks a picture to this times the hash's side


def phash(stored: bytes, hash_size: int) -> NDArray[np.uint8]:
    """Packed bits [hash_size * hash_size / 8] of a picture that `inspect` let through."""
    picture = Image.open(io.BytesIO(stored), formats=STORED_AS_IS)
    picture.draft("L", (2 * RASTER * hash_size, 2 * RASTER * hash_size))
    return np.packbits(imagehash.phash(picture, hash_size=hash_size, highfreq_factor=RASTER).hash.ravel())

"""Perceptual hashes from JPEG bytes against the naive loop `imagehash.phash(Image.open(...))`, on one core.

value: CPU seconds of the naive loop over ours (bar 2), taken in turn; beside it, by how many of 64 bits the hashes
differ. Pictures: 200 crops of the two photographs that scikit-learn ships, 0.1 to 0.27 megapixels, JPEG quality 85.
"""

from __future__ import annotations

import io
import json
import statistics
import time
from importlib.resources import files
from typing import Any

import imagehash
import numpy as np
from PIL import Image

from benchmarks.record import record
from data_curation.hashing import VERSION, phash

SEED, PICTURES, ROUNDS, HASH_SIZE, BAR = 0, 200, 5, 8, 2.0


def photographs(rng: np.random.Generator) -> list[bytes]:
    """Crops as JPEG bytes."""
    folder = files("sklearn.datasets") / "images"
    photos = [Image.open(io.BytesIO((folder / name).read_bytes())) for name in ("china.jpg", "flower.jpg")]
    bodies = []
    for i in range(PICTURES):
        photo, scale = photos[i % 2], rng.uniform(0.6, 1.0)
        width, height = int(photo.width * scale), int(photo.height * scale)
        left, top = rng.integers(0, photo.width - width + 1), rng.integers(0, photo.height - height + 1)
        out = io.BytesIO()
        photo.crop((left, top, left + width, top + height)).save(out, "JPEG", quality=85)
        bodies.append(out.getvalue())
    return bodies


def main() -> dict[str, Any]:
    """Both ways in turn, then the drift."""
    bodies = photographs(np.random.default_rng(SEED))
    seconds: dict[str, list[float]] = {"naive": [], "ours": []}
    for _ in range(ROUNDS):
        began = time.process_time()
        plain = [imagehash.phash(Image.open(io.BytesIO(body)), hash_size=HASH_SIZE) for body in bodies]
        seconds["naive"].append(time.process_time() - began)
        began = time.process_time()
        ours = [phash(body, HASH_SIZE) for body in bodies]
        seconds["ours"].append(time.process_time() - began)
    drift = [int(np.bitwise_count(np.packbits(a.hash.ravel()) ^ b).sum()) for a, b in zip(plain, ours, strict=True)]
    naive, own = (statistics.median(found) for found in seconds.values())
    detail = {
        "pictures": PICTURES, "milliseconds": {"naive": naive / PICTURES * 1e3, "ours": own / PICTURES * 1e3},
        "drift_bits": {"mean": float(np.mean(drift)), "max": max(drift), "of": HASH_SIZE**2}, "version": VERSION,
    }  # fmt: skip
    return record("image_hashing", [SEED], naive, own, BAR, naive / own >= BAR, detail)


if __name__ == "__main__":
    print(json.dumps(main()))

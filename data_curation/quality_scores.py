"""Technical scores of one picture: blur (Crete et al. 2007, re-blurring), JPEG quality from its tables, contrast."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, JpegImagePlugin

from data_curation.technical import border, clipped, overlay

SCORE_SIDE = 192  # px; blur is judged at the size at which a picture is looked at
REBLUR = 9  # px, as in the paper
MEAN_TABLE_AT_50 = 57.625  # mean of the standard's luminance table


def blur(grey: NDArray[np.float32]) -> float:
    """0 sharp to 1 blurred: how little of the variation between neighbours one more blur takes away."""
    scores = []
    for values in (grey, grey.T):
        sums = np.cumsum(
            np.pad(values, ((0, 0), (REBLUR // 2 + 1, REBLUR // 2)), mode="edge"), axis=1, dtype=np.float64
        )
        blurred = (sums[:, REBLUR:] - sums[:, :-REBLUR]) / REBLUR
        before, after = np.abs(np.diff(values, axis=1)), np.abs(np.diff(blurred, axis=1))
        total = float(before.sum())
        scores.append(1 - float(np.maximum(0, before - after).sum()) / total if total > 0 else 0.0)
    return max(scores)


def jpeg_quality(image: Image.Image) -> int | None:
    """The quality setting that a JPEG's luminance table stands for (libjpeg's scale); None for other formats."""
    if not isinstance(image, JpegImagePlugin.JpegImageFile) or not image.quantization:
        return None
    scale = 100 * float(np.mean(image.quantization[0])) / MEAN_TABLE_AT_50
    return round(100 - scale / 2 if scale <= 100 else 5000 / scale)


def scores(stored: bytes, more: bool = False) -> dict[str, Any]:
    """All scores of a stored picture; `more`: those of `technical.py` too."""
    image = Image.open(io.BytesIO(stored))
    quality = jpeg_quality(image)
    grey_image = image.convert("L")
    grey_image.thumbnail((SCORE_SIDE, SCORE_SIDE), Image.Resampling.BOX)
    grey = np.asarray(grey_image, np.float32)
    usual = {"blur": round(blur(grey), 4), "jpeg_quality": quality, "contrast": round(float(grey.std()), 3)}
    if not more:
        return usual
    return usual | {
        "border": round(border(grey), 4), "clipped": round(clipped(grey), 4), "overlay": round(overlay(grey), 3)
    }  # fmt: skip

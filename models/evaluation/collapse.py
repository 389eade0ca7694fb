"""Cheap checks for pictures that are no pictures: black, constant, noise, or all the same."""

from __future__ import annotations

import numpy as np

FLAT_DEVIATION = 2.0  # of 255, over all pixels and channels after the channel means are taken out
BLACK_LEVEL = 8.0
NOISE_CORRELATION = 0.25  # of neighbouring pixels; drawings have more than 0.32, noise about 0


def neighbour_correlation(images: np.ndarray) -> np.ndarray:
    """Correlation [N] of neighbouring pixels over all channels of uint8 [N, H, W, 3]; flat pictures give 1."""
    pixels = images.astype(np.float64)
    pixels -= pixels.mean((1, 2), keepdims=True)
    power = (pixels**2).mean((1, 2, 3))
    sideways = (pixels[:, :, 1:] * pixels[:, :, :-1]).mean((1, 2, 3))
    down = (pixels[:, 1:] * pixels[:, :-1]).mean((1, 2, 3))
    result: np.ndarray = np.where(power > 1e-9, (sideways + down) / 2 / np.maximum(power, 1e-9), 1.0)
    return result


def collapsed(images: np.ndarray) -> dict[str, np.ndarray]:
    """Per picture: black, constant, noise, a copy of an earlier picture; and any of them."""
    pixels = images.astype(np.float64)
    constant = (pixels - pixels.mean((1, 2), keepdims=True)).std((1, 2, 3)) < FLAT_DEVIATION
    black = constant & (pixels.mean((1, 2, 3)) < BLACK_LEVEL)
    noise = ~constant & (neighbour_correlation(images) < NOISE_CORRELATION)
    seen: set[bytes] = set()
    copies = []
    for image in images:
        data = image.tobytes()
        copies.append(data in seen)
        seen.add(data)
    copied = np.array(copies, dtype=bool)
    kinds = {"black": black, "constant": constant, "noise": noise, "copy": copied}
    return kinds | {"any": constant | noise | copied}

"""High-frequency energy: what regression to the mean takes away. Blurred pictures have less than real ones."""

from __future__ import annotations

import numpy as np


def high_frequency_energy(images: np.ndarray, above: float = 0.25) -> float:
    """Mean spectral power of pictures uint8 [N, H, W, 3] at `above` cycles a pixel and more, in either direction."""
    _, height, width, _ = images.shape
    grey = images.astype(np.float64).mean(-1)
    power = np.abs(np.fft.fft2(grey - grey.mean((1, 2), keepdims=True))) ** 2
    frequency = np.maximum(np.abs(np.fft.fftfreq(height))[:, None], np.abs(np.fft.fftfreq(width))[None])
    return float(power[:, frequency >= above].mean())

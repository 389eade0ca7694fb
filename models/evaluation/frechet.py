"""Frechet distance (FID, arXiv:1706.08500): |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)) of two sets of features.

Its estimate is biased upward by about the number of features over the number of pictures, so fewer than 20 pictures a
feature are refused: use the kernel distance there, or project the features first (`projected`).
"""

from __future__ import annotations

import numpy as np

LEAST_PER_FEATURE = 20


def frechet_distance(sample: np.ndarray, reference: np.ndarray, least: int = LEAST_PER_FEATURE) -> float:
    """Distance of features [N, D] to [M, D]; refused below `least` pictures a feature on either side."""
    n, size = min(len(sample), len(reference)), sample.shape[1]
    if n < least * size:
        raise ValueError(
            f"Frechet distance of {size} features needs {least * size} pictures on both sides, got {n}; draw more, "
            "project to fewer features, or read the kernel distance"
        )
    x, y = sample.astype(np.float64), reference.astype(np.float64)
    c_x, c_y = np.atleast_2d(np.cov(x, rowvar=False)), np.atleast_2d(np.cov(y, rowvar=False))
    root = _root(c_x)  # eigenvalues of C_x C_y are those of the symmetric C_x^(1/2) C_y C_x^(1/2)
    mixed = np.linalg.eigvalsh(root @ c_y @ root).clip(0)
    shift = float(((x.mean(0) - y.mean(0)) ** 2).sum())
    return max(0.0, shift + float(np.trace(c_x) + np.trace(c_y)) - 2 * float(np.sqrt(mixed).sum()))


def _root(matrix: np.ndarray) -> np.ndarray:
    """Square root of a symmetric positive matrix."""
    values, vectors = np.linalg.eigh(matrix)
    root: np.ndarray = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    return root


def projected(features: np.ndarray, reference: np.ndarray, size: int) -> np.ndarray:
    """Features [N, size]: the first principal directions of the reference [M, D]."""
    centre = reference.mean(0)
    _, _, directions = np.linalg.svd(reference.astype(np.float64) - centre, full_matrices=False)
    flat: np.ndarray = (features.astype(np.float64) - centre) @ directions[:size].T
    return flat

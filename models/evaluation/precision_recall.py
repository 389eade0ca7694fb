"""Improved precision and recall (Kynkaanniemi et al. 2019, arXiv:1904.06991): is a sample inside the other's manifold?

A manifold is the union of balls around each point that reach its k-th neighbour. Precision: share of generated pictures
inside the real manifold; recall: share of real pictures inside the generated one.
"""

from __future__ import annotations

import numpy as np


def squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """[N, M] of features [N, D] and [M, D]."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    squares: np.ndarray = (x * x).sum(1)[:, None] + (y * y).sum(1)[None] - 2 * x @ y.T
    return squares.clip(0)


def inside(points: np.ndarray, manifold: np.ndarray, neighbours: int) -> float:
    """Share of `points` [N, D] within the k-nearest-neighbour balls of `manifold` [M, D]."""
    if len(manifold) <= neighbours:
        raise ValueError(f"{len(manifold)} pictures have no {neighbours} neighbours; draw more")
    radius = np.sort(squared_distances(manifold, manifold), 1)[:, neighbours]  # column 0 is the point itself
    return float((squared_distances(points, manifold) <= radius[None]).any(1).mean())


def precision_recall(generated: np.ndarray, real: np.ndarray, neighbours: int = 3) -> tuple[float, float]:
    """(precision, recall) of generated features [N, D] against real ones [M, D]."""
    return inside(generated, real, neighbours), inside(real, generated, neighbours)

"""Density and coverage (Naeem et al. 2020, arXiv:2002.09797): precision and recall that one outlier cannot fool.

Density: in how many real k-nearest-neighbour balls a generated picture lies on average, over k (1 for equal sets, may
exceed it). Coverage: share of real pictures whose ball holds a generated one.
"""

from __future__ import annotations

import numpy as np

from models.evaluation.judge import area_average
from models.evaluation.precision_recall import squared_distances
from models.evaluation.vendi import vendi_score

PLACES = 8


def density_coverage(generated: np.ndarray, real: np.ndarray, neighbours: int = 5) -> tuple[float, float]:
    """(density, coverage) of generated features [N, D] against real ones [M, D]."""
    if len(real) <= neighbours:
        raise ValueError(f"{len(real)} real pictures have no {neighbours} neighbours; take more")
    radius = np.sort(squared_distances(real, real), 1)[:, neighbours]
    within = squared_distances(real, generated) < radius[:, None]  # [M, N]
    return float(within.sum(0).mean() / neighbours), float(within.any(1).mean())


def mode_share(generated: np.ndarray, real: np.ndarray) -> float:
    """Effective number of different pictures over that of real ones: 1 as many, 0 one picture for everything.

    Both are uint8 [N, S, S, 3] of the same prompts; the pictures are compared as 8 x 8 places.
    """
    if len(generated) != len(real) or len(real) < 2:
        raise ValueError(f"{len(generated)} drawn and {len(real)} real pictures; give the same prompts, at least two")
    places = [area_average(images, PLACES).reshape(len(images), -1).astype(np.float64) for images in (generated, real)]
    centre = places[1].mean(0)
    drawn, wanted = (vendi_score(part - centre) for part in places)
    return max(0.0, (drawn - 1) / max(wanted - 1, 1e-9))

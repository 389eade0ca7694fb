"""Memorisation: is a generated picture a training picture? (Carlini et al. 2023, arXiv:2301.13188, nearest neighbours.)

The threshold is calibrated, not chosen: distances of real pictures that were never trained on to their nearest training
picture. A generated picture counts as a copy when it lies nearer than all but `error` of those.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from models.evaluation.intervals import Score, wilson
from models.evaluation.precision_recall import squared_distances

ROWS = 512  # pictures compared at a time


@dataclass(frozen=True)
class Nearest:
    """The nearest training picture of each picture: its row [N] and the distance [N]."""

    rows: np.ndarray
    distances: np.ndarray


@dataclass(frozen=True)
class Memorisation:
    """Share of copies with its interval, the threshold, and whom each picture is nearest to."""

    copied: Score
    threshold: float
    nearest: Nearest


def nearest(features: np.ndarray, training: np.ndarray) -> Nearest:
    """Nearest rows of training features [M, D] for features [N, D], a part at a time."""
    rows, distances = [], []
    for start in range(0, len(features), ROWS):
        squared = squared_distances(features[start : start + ROWS], training)
        rows.append(squared.argmin(1))
        distances.append(np.sqrt(squared.min(1)))
    return Nearest(np.concatenate(rows), np.concatenate(distances))


def memorisation(generated: np.ndarray, training: np.ndarray, unseen: np.ndarray, error: float = 0.01) -> Memorisation:
    """Copies among generated features [N, D]; `unseen` [K, D] are real pictures that were not trained on."""
    if len(unseen) * error < 1:
        raise ValueError(
            f"{len(unseen)} unseen pictures cannot calibrate an error of {error:g}; give {int(np.ceil(1 / error))} or "
            "allow more"
        )
    threshold = float(np.quantile(nearest(unseen, training).distances, error))
    found = nearest(generated, training)
    return Memorisation(wilson(found.distances < threshold), threshold, found)

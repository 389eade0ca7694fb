"""Mode collapse shows first within a prompt: pictures of one prompt and many seeds grow alike."""

from __future__ import annotations

import numpy as np

from models.evaluation.intervals import Score, bootstrap


def within_prompt_distances(features: np.ndarray) -> np.ndarray:
    """Mean pairwise distance per prompt [P] of features [P, S, D], divided by the root of D."""
    _, seeds, size = features.shape
    if seeds < 2:
        raise ValueError(f"diversity needs 2 seeds per prompt, got {seeds}; raise diversity_seeds")
    difference = features[:, :, None, :] - features[:, None, :, :]
    distances = np.sqrt((difference.astype(np.float64) ** 2).sum(-1) / size)
    means: np.ndarray = distances.sum((1, 2)) / (seeds * (seeds - 1))
    return means


def diversity(features: np.ndarray, resamples: int, rng: np.random.Generator) -> Score:
    """Mean over prompts of the within-prompt distance; the interval resamples prompts."""
    return bootstrap((within_prompt_distances(features),), lambda x: float(x.mean()), resamples, rng)

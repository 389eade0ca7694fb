"""Kernel distance (KID, arXiv:1801.01401): unbiased squared MMD with the cubic kernel (x.y / d + 1)^3.

Unlike the Frechet distance its expectation does not depend on the sample size, so it can be read at a few hundred
pictures, and it may be slightly negative. Features are scaled so that the reference has mean squared entry one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from models.evaluation.intervals import Score, score


def cubic_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Kernel matrix [N, M] of features [N, D] and [M, D]."""
    kernel: np.ndarray = (x @ y.T / x.shape[1] + 1.0) ** 3
    return kernel


def unbiased_mmd(xx: np.ndarray, yy: np.ndarray, xy: np.ndarray) -> float:
    """Unbiased squared MMD from the three kernel matrices."""
    n, m = len(xx), len(yy)
    within_x = (xx.sum() - np.trace(xx)) / (n * (n - 1))
    within_y = (yy.sum() - np.trace(yy)) / (m * (m - 1))
    return float(within_x + within_y - 2 * xy.mean())


def _weighted_within(kernel: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean over pairs of different pictures under weights [B, N]; a picture drawn twice makes no pair with itself."""
    total = np.einsum("bi,ij,bj->b", weights, kernel, weights, optimize=True) - weights**2 @ np.diag(kernel)
    pairs: np.ndarray = total / (weights.sum(1) ** 2 - (weights**2).sum(1))
    return pairs


@dataclass(frozen=True)
class KernelDistance:
    """The distance, and the probability of one as large if both samples came from the same distribution."""

    score: Score
    p_value: float


def kernel_distance(
    sample: np.ndarray, reference: np.ndarray, resamples: int, rng: np.random.Generator, permutations: int = 200
) -> KernelDistance:
    """Distance of features [N, D] to [M, D] with a bootstrap interval and a permutation p-value."""
    n, m = len(sample), len(reference)
    if min(n, m) < 2:
        raise ValueError(f"kernel distance needs 2 pictures on both sides, got {n} and {m}; draw more")
    scale = float(np.sqrt(np.mean(reference.astype(np.float64) ** 2))) or 1.0
    pooled = np.concatenate([sample, reference]).astype(np.float64) / scale
    kernel = cubic_kernel(pooled, pooled)
    xx, yy, xy = kernel[:n, :n], kernel[n:, n:], kernel[:n, n:]
    value = unbiased_mmd(xx, yy, xy)
    w_x = rng.multinomial(n, np.full(n, 1 / n), size=resamples).astype(float)
    w_y = rng.multinomial(m, np.full(m, 1 / m), size=resamples).astype(float)
    cross = np.einsum("bi,ij,bj->b", w_x, xy, w_y, optimize=True) / (n * m)
    low, high = np.quantile(_weighted_within(xx, w_x) + _weighted_within(yy, w_y) - 2 * cross, (0.025, 0.975))
    larger = 0
    for _ in range(permutations):
        order = rng.permutation(n + m)
        a, b = order[:n], order[n:]
        larger += unbiased_mmd(kernel[np.ix_(a, a)], kernel[np.ix_(b, b)], kernel[np.ix_(a, b)]) >= value
    return KernelDistance(score(value, low, high, n), (larger + 1) / (permutations + 1))

"""What a reward model's differences are worth on prompts that it was not trained on.

Margins are r_winner - r_loser [N]; sigmoid(margin / temperature) is the probability it gives to the given order
(temperature scaling, arXiv:1706.04599). Labels with noise have a ceiling: no model agrees with more than 1 - noise of them.
"""

from __future__ import annotations

import numpy as np

BINS = 10
TEMPERATURES = np.logspace(-2, 2, 161)


def temperature(margins: np.ndarray) -> float:
    """The temperature with the least mean -log sigmoid(margin / T), on a grid of 6 % steps."""
    losses = [float(np.logaddexp(0, -margins / t).mean()) for t in TEMPERATURES]
    return float(TEMPERATURES[int(np.argmin(losses))])


def calibration_error(margins: np.ndarray, at: float) -> float:
    """Expected calibration error: mean |agreement - confidence| over bins of confidence 0.5..1, by their size."""
    confidence = 1 / (1 + np.exp(-np.abs(margins) / at))
    right = (margins > 0) + 0.5 * (margins == 0)
    bins = np.minimum((2 * (confidence - 0.5) * BINS).astype(int), BINS - 1)
    gaps = [abs((right - confidence)[bins == b].sum()) for b in np.unique(bins)]
    return float(sum(gaps) / len(margins))


def bayes_accuracy(utility_gaps: np.ndarray) -> float:
    """Best possible agreement with labels drawn as Bernoulli(sigmoid(u_w - u_l)): E[sigmoid(|gap|)]."""
    return float((1 / (1 + np.exp(-np.abs(utility_gaps)))).mean())


def kept_probability(strengths: np.ndarray, noise: float, scale: float | None) -> np.ndarray:
    """P(a label stays) [N] where order is drawn with sigmoid(strength / scale) (None: kept), then turned with P `noise`.

    The mean of max(p, 1 - p) is the planted noise's Bayes limit, the best possible agreement.
    """
    drawn = np.ones(len(strengths)) if scale is None else 1 / (1 + np.exp(-strengths / scale))
    kept: np.ndarray = drawn * (1 - noise) + (1 - drawn) * noise
    return kept

"""Intervals for what is measured on a few hundred prompts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import TypedDict

import numpy as np

Z_95 = 1.959963984540054
T_95 = {
    2: 12.706,
    3: 4.303,
    4: 3.182,
    5: 2.776,
    6: 2.571,
    7: 2.447,
    8: 2.365,
    9: 2.306,
    10: 2.262,
}  # of Student's t, by the number of seeds


class Score(TypedDict):
    """One metric with its 95 % interval and the number of pictures or pairs behind it."""

    value: float
    low: float
    high: float
    n: int


def score(value: float, low: float, high: float, n: int) -> Score:
    """A score rounded to five places, so that files stay short and equal."""
    return Score(value=round(float(value), 5), low=round(float(low), 5), high=round(float(high), 5), n=int(n))


def wilson(right: np.ndarray) -> Score:
    """Share of true values with the Wilson score interval (never outside 0..1, sound at 0 and 1)."""
    n = len(right)
    if n == 0:
        raise ValueError("a share of 0 pictures is undefined; score at least one")
    share, squared = float(np.mean(right)), Z_95**2
    middle = (share + squared / (2 * n)) / (1 + squared / n)
    reach = Z_95 * math.sqrt(share * (1 - share) / n + squared / (4 * n * n)) / (1 + squared / n)
    return score(share, max(0.0, middle - reach), min(1.0, middle + reach), n)


def bootstrap(
    arrays: tuple[np.ndarray, ...], statistic: Callable[..., float], resamples: int, rng: np.random.Generator
) -> Score:
    """Percentile bootstrap of a statistic of arrays that are resampled together (paired)."""
    n = len(arrays[0])
    picks = rng.integers(n, size=(resamples, n))
    values = [statistic(*(array[pick] for array in arrays)) for pick in picks]
    low, high = np.quantile(values, (0.025, 0.975))
    return score(statistic(*arrays), low, high, n)


def share_by_prompt(right: np.ndarray, resamples: int, rng: np.random.Generator) -> Score:
    """Share of right pictures bool [P, K], K of each prompt; prompts, not pictures, are resampled, as a prompt's are alike.

    With one picture a prompt, or none or all of them right, the Wilson interval of P.
    """
    each = right.mean(1)
    if right.shape[1] == 1 or each.mean() in (0, 1):
        return wilson(each)
    return bootstrap((each,), lambda x: float(x.mean()), resamples, rng)


def mean_of_groups(groups: list[np.ndarray], resamples: int, rng: np.random.Generator) -> Score:
    """Mean of the groups' means of one number a prompt; prompts are resampled within their group."""
    drawn = np.stack([g[rng.integers(len(g), size=(resamples, len(g)))].mean(1) for g in groups]).mean(0)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return score(float(np.mean([g.mean() for g in groups])), low, high, sum(map(len, groups)))


def paired(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Mean difference with its 95 % t-interval over the seeds."""
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean = statistics.fmean(gaps)
    half = T_95[len(gaps)] * statistics.stdev(gaps) / math.sqrt(len(gaps))
    return {"difference": round(mean, 5), "low": round(mean - half, 5), "high": round(mean + half, 5)}

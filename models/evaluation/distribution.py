"""How far a set of pictures is from another in an embedding: every measure of this folder with an interval.

Intervals are 95 % by the delete-a-group jackknife (10 groups): a bootstrap repeats pictures, and a picture beside its own copy has
a neighbour at distance 0, which spoils everything that counts neighbours. The kernel distance keeps its bootstrap, which
leaves such pairs out.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from models.evaluation.density_coverage import density_coverage
from models.evaluation.distances import kernel_distance
from models.evaluation.frechet import LEAST_PER_FEATURE, frechet_distance, projected
from models.evaluation.intervals import Z_95, Score, score
from models.evaluation.precision_recall import precision_recall
from models.evaluation.vendi import vendi_score

GROUPS = 10
LEAST = 4 * GROUPS  # pictures on each side
NEIGHBOURS = {"precision": 3, "density": 5}
MOST = {"precision": 1.0, "recall": 1.0, "coverage": 1.0}
Measures = dict[str, float]


def distribution(generated: np.ndarray, real: np.ndarray, resamples: int, rng: np.random.Generator) -> dict[str, Score]:
    """Scores of features [N, D] against [M, D]; both sides need at least 40 pictures.

    The Frechet distance is taken along the first principal directions of `real`, as many as 20 pictures a direction allow.
    """
    n, m = len(generated), len(real)
    if min(n, m) < LEAST:
        raise ValueError(f"{n} drawn and {m} real pictures are compared; give at least {LEAST} of each")
    directions = max(1, int(min(n, m) * (1 - 1 / GROUPS)) // LEAST_PER_FEATURE)
    flat = projected(generated, real, directions), projected(real, real, directions)

    def measure(rows: np.ndarray, others: np.ndarray) -> Measures:
        x, y = generated[rows], real[others]
        precision, recall = precision_recall(x, y, NEIGHBOURS["precision"])
        density, coverage = density_coverage(x, y, NEIGHBOURS["density"])
        return {
            f"frechet_{directions}d": frechet_distance(flat[0][rows], flat[1][others]), "precision": precision,
            "recall": recall, "density": density, "coverage": coverage, "vendi": vendi_score(x),
        }  # fmt: skip

    found = {"kernel_distance": kernel_distance(generated, real, resamples, rng, permutations=0).score}
    return found | jackknife(measure, n, m, rng)


def jackknife(
    measure: Callable[[np.ndarray, np.ndarray], Measures], n: int, m: int, rng: np.random.Generator
) -> dict[str, Score]:
    """Each measure with an interval from leaving out one of ten groups of both sides at a time."""
    parts = [np.array_split(rng.permutation(size), GROUPS) for size in (n, m)]
    whole = measure(np.arange(n), np.arange(m))
    without = [measure(*(np.sort(np.concatenate(side[:g] + side[g + 1 :])) for side in parts)) for g in range(GROUPS)]
    found = {}
    for name, value in whole.items():
        values = np.array([each[name] for each in without])
        reach = Z_95 * float(np.sqrt((GROUPS - 1) / GROUPS * ((values - values.mean()) ** 2).sum()))
        found[name] = score(value, max(0.0, value - reach), min(MOST.get(name, np.inf), value + reach), n)
    return found

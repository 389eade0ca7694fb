"""The measures equal the field's own tools, and their intervals are standard errors."""

import numpy as np
import pytest

from models.evaluation.density_coverage import density_coverage
from models.evaluation.distances import kernel_distance
from models.evaluation.distribution import distribution, jackknife
from models.evaluation.frechet import frechet_distance
from models.evaluation.precision_recall import precision_recall
from models.evaluation.vendi import vendi_score


def two_sets() -> tuple[np.ndarray, np.ndarray]:
    """(real [120, 6], made [100, 6]) that the oracles below were computed from."""
    rng = np.random.default_rng(5)
    return rng.normal(size=(120, 6)), rng.normal(size=(100, 6)) * 0.8 + 0.3


def test_measures_equal_the_field_s_own_tools() -> None:
    """prdc 0.2 (k = 5 and 3), vendi-score 0.0.3, torchmetrics 1.9.0 and torch-fidelity 0.4.0 (Frechet), run once on these sets."""
    real, made = two_sets()
    assert precision_recall(made, real, 5) == pytest.approx((0.98, 0.7833333333333333))
    assert precision_recall(made, real, 3) == pytest.approx((0.95, 0.7333333333333333))
    assert density_coverage(made, real, 5) == pytest.approx((1.27, 0.9166666666666666))
    assert density_coverage(made, real, 3) == pytest.approx((1.2866666666666666, 0.7916666666666666))
    assert vendi_score(made) == pytest.approx(5.564312434596321)
    assert frechet_distance(made, real, least=10) == pytest.approx(1.2989484362896473)
    distance = kernel_distance(made, real[:100], 20, np.random.default_rng(0), 0).score["value"]
    assert distance == pytest.approx(0.5460005991980674, abs=1e-5)  # torchmetrics' poly_mmd, same scale


def test_the_jackknife_gives_the_standard_error_of_a_mean_and_covers_it() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        x = rng.normal(size=200)
        found = jackknife(lambda a, b, x=x: {"mean": 5 + float(x[a].mean())}, 200, 200, rng)["mean"]
        covered += found["low"] <= 5 <= found["high"]
    assert 0.86 <= covered / 200 <= 0.99  # ten groups: nine degrees of freedom
    assert (found["high"] - found["low"]) / 2 == pytest.approx(1.96 / np.sqrt(200), rel=0.6)


def test_a_shift_is_told_from_equal_sets_and_few_pictures_are_refused() -> None:
    rng = np.random.default_rng(1)
    real, same, other = rng.normal(size=(80, 12)), rng.normal(size=(80, 12)), rng.normal(1.0, 1, (80, 12))
    near, far = (distribution(x, real, 50, np.random.default_rng(0)) for x in (same, other))
    assert near["kernel_distance"]["low"] < 0 < near["kernel_distance"]["high"] < far["kernel_distance"]["low"]
    assert near["frechet_3d"]["high"] < far["frechet_3d"]["value"]
    assert near["coverage"]["value"] > far["coverage"]["high"]
    assert all(score["low"] <= score["value"] <= score["high"] for score in {**near, **far}.values())
    with pytest.raises(ValueError, match="give at least 40 of each"):
        distribution(real[:39], real, 50, rng)

"""Each measure against an independent slow formula, a closed form, and what it must refuse."""

import numpy as np
import pytest
import scipy.linalg

from models.evaluation.density_coverage import density_coverage
from models.evaluation.frechet import frechet_distance, projected
from models.evaluation.memorisation import memorisation
from models.evaluation.vendi import vendi_score


def test_frechet_distance_equals_scipy_and_a_shift_is_its_square() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(0.3, 1.4, (400, 6)) @ rng.normal(size=(6, 6)), rng.normal(0, 1, (300, 6))
    c_x, c_y = np.cov(x.T), np.cov(y.T)
    root = scipy.linalg.sqrtm(c_x @ c_y).real
    slow = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(c_x + c_y - 2 * root)
    assert frechet_distance(x, y) == pytest.approx(slow, rel=1e-6)
    assert frechet_distance(x, x + 0.5) == pytest.approx(6 * 0.25, rel=1e-6)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_refuses_few_pictures_and_projection_helps() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(100, 8)), rng.normal(size=(100, 8))
    with pytest.raises(ValueError, match="needs 160 pictures on both sides, got 100"):
        frechet_distance(x, y)
    assert frechet_distance(projected(x, y, 4), projected(y, y, 4)) > 0


def test_density_and_coverage_equal_the_definition_pair_by_pair() -> None:
    rng = np.random.default_rng(1)
    real, made = rng.normal(size=(30, 3)), rng.normal(0.4, 1, (25, 3))
    k = 4
    radius = [sorted(np.linalg.norm(real[i] - other) for other in real)[k] for i in range(30)]
    hits = [[np.linalg.norm(real[i] - made[j]) < radius[i] for j in range(25)] for i in range(30)]
    expected = sum(map(sum, hits)) / (k * 25), sum(map(any, hits)) / 30
    assert density_coverage(made, real, k) == pytest.approx(expected)
    assert density_coverage(np.repeat(real[:1], 25, 0), real, k)[1] < 0.4  # one mode covers little
    with pytest.raises(ValueError, match="no 5 neighbours"):
        density_coverage(made, real[:5])


def test_vendi_score_counts_different_pictures() -> None:
    rng = np.random.default_rng(2)
    assert vendi_score(np.ones((7, 4))) == pytest.approx(1)
    assert vendi_score(np.eye(6)) == pytest.approx(6)
    assert vendi_score(np.repeat(np.eye(3), 5, 0)) == pytest.approx(3)
    x = rng.normal(size=(20, 5))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    shares = np.linalg.eigvalsh(unit @ unit.T / 20)
    assert vendi_score(x) == pytest.approx(np.exp(-sum(s * np.log(s) for s in shares if s > 1e-12)))


def test_copies_are_found_and_new_pictures_of_the_same_kind_are_not() -> None:
    rng = np.random.default_rng(3)
    training, unseen, new = (rng.normal(size=(n, 10)) for n in (600, 400, 200))
    copies = training[rng.permutation(600)[:50]] + rng.normal(0, 0.01, (50, 10))
    found = memorisation(np.concatenate([new, copies]), training, unseen)
    assert (found.nearest.distances[200:] < found.threshold).all()
    assert (found.nearest.distances[:200] < found.threshold).mean() < 0.05
    assert 0.18 < found.copied["value"] < 0.26
    with pytest.raises(ValueError, match="cannot calibrate"):
        memorisation(new, training, unseen[:50])

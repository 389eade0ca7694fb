import numpy as np
import pytest
from pydantic import ValidationError

from models.evaluation.collapse import collapsed
from models.evaluation.config import GateConfig
from models.evaluation.distances import kernel_distance
from models.evaluation.diversity import diversity, within_prompt_distances
from models.evaluation.gates import judge_gate, paired_difference
from models.evaluation.intervals import bootstrap, score, wilson


def slow_kid(x: np.ndarray, y: np.ndarray) -> float:
    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((np.dot(a, b) / len(a) + 1) ** 3)

    n, m = len(x), len(y)
    within = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within += sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within - 2 * sum(kernel(a, b) for a in x for b in y) / (n * m)


def test_kernel_distance_equals_the_slow_formula() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(0.3, 1, (9, 5)), rng.normal(0, 1, (7, 5))
    scale = np.sqrt((y**2).mean())
    found = kernel_distance(x, y, 20, np.random.default_rng(1), permutations=5)
    assert found.score["value"] == pytest.approx(slow_kid(x / scale, y / scale), abs=1e-5)


def test_kernel_distance_is_unbiased_and_sees_a_shift() -> None:
    rng = np.random.default_rng(0)
    same = [
        kernel_distance(rng.normal(size=(60, 8)), rng.normal(size=(60, 8)), 20, rng, 1).score["value"]
        for _ in range(40)
    ]
    assert abs(np.mean(same)) < 3 * np.std(same) / 40**0.5
    shifted = kernel_distance(rng.normal(0.5, 1, (60, 8)), rng.normal(size=(60, 8)), 100, rng)
    assert shifted.score["low"] > 0
    assert shifted.p_value < 0.02


def test_wilson_at_the_ends_and_against_the_book() -> None:
    assert wilson(np.zeros(20, bool))["low"] == 0
    assert wilson(np.ones(20, bool))["high"] == 1
    book = wilson(np.arange(100) < 30)
    assert (book["low"], book["high"]) == pytest.approx((0.2189, 0.3958), abs=1e-4)
    with pytest.raises(ValueError, match="undefined"):
        wilson(np.zeros(0, bool))


def test_bootstrap_covers_the_mean_of_a_normal() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(60):
        found = bootstrap((rng.normal(size=80),), lambda x: float(x.mean()), 200, rng)
        hits += found["low"] <= 0 <= found["high"]
    assert hits >= 50


def test_diversity_of_copies_is_zero_and_of_a_square_is_known() -> None:
    assert diversity(np.ones((3, 4, 2)), 20, np.random.default_rng(0))["value"] == 0
    corners = np.array([[[0.0, 0.0], [1.0, 0.0]]])
    assert within_prompt_distances(corners)[0] == pytest.approx(1 / 2**0.5)


def test_collapse_names_black_constant_noise_and_copies() -> None:
    rng = np.random.default_rng(0)
    drawing = np.full((32, 32, 3), 240, np.uint8)
    drawing[8:24, 8:24] = (200, 30, 30)
    noise = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    images = np.stack([drawing, np.zeros_like(drawing), np.full_like(drawing, 90), noise, drawing])
    found = collapsed(images)
    assert found["black"].tolist() == [False, True, False, False, False]
    assert found["constant"].tolist() == [False, True, True, False, False]
    assert found["noise"].tolist() == [False, False, False, True, False]
    assert found["copy"].tolist() == [False, False, False, False, True]
    assert found["any"].tolist() == [False, True, True, True, True]


def test_gates_pass_miss_and_say_why() -> None:
    scores = {
        "sft": {"prompt_accuracy": score(0.9, 0.85, 0.95, 4)},
        "dpo": {"prompt_accuracy": score(0.5, 0.4, 0.6, 4)},
    }
    answers = {"sft": {"prompt_accuracy": np.array([1, 1, 1, 1])}, "dpo": {"prompt_accuracy": np.array([1, 0, 1, 0])}}
    assert judge_gate(GateConfig(stage="sft", minimum=0.8), scores, answers)["passed"]
    low = judge_gate(GateConfig(stage="dpo", minimum=0.8), scores, answers)
    assert not low["passed"]
    assert "0.500 is below the minimum 0.8" in low["reason"]
    drop = judge_gate(GateConfig(stage="dpo", parent="sft", parent_drop=0.02), scores, answers)
    assert not drop["passed"]
    assert drop["difference"] is not None
    assert drop["difference"]["value"] == -0.5
    assert judge_gate(GateConfig(stage="dpo", parent="sft", parent_ratio=0.5), scores, answers)["passed"]
    missing = judge_gate(GateConfig(stage="dpo", metric="diversity", minimum=0), scores, answers)
    assert not missing["passed"]
    assert "no diversity" in missing["reason"]


def test_gate_config_and_pairing_refuse_nonsense() -> None:
    with pytest.raises(ValidationError, match="no bound"):
        GateConfig(stage="dpo")
    with pytest.raises(ValidationError, match="go together"):
        GateConfig(stage="dpo", parent_drop=0.1)
    with pytest.raises(ValueError, match="not paired"):
        paired_difference(np.ones(3), np.ones(4))

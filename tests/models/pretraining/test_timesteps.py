"""Densities and shifts against closed forms, against diffusers 0.42.1 where it is right, and pinned where it is not."""

import math
from itertools import product

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling
from pydantic import ValidationError
from scipy.stats import kstest

from models.engine.randomness import Randomness
from models.networks.export import scheduler_settings
from models.pretraining.config import TimestepConfig
from models.pretraining.densities import bars, histogram, share_below
from models.pretraining.timesteps import apply_shift, mode_quantile, sample_times, shift_of
from models.sampling.euler import grid

DENSITIES = {
    "uniform": {"density": "uniform"},
    "logit-normal": {"density": "logit_normal", "mean": 0.6, "std": 0.8},
    "mode": {"density": "mode", "mode_scale": 1.29},
    "mode, ends": {"density": "mode", "mode_scale": -0.8},
    "cosmap": {"density": "cosmap"},
    "beta": {"density": "beta", "beta": (2.0, 1.0)},
    "mixture": {"density": "logit_normal", "mean": 1.0, "uniform_share": 0.1},
}
SHIFTS = {
    "none": {"shift": "none"},
    "static": {"shift": "static", "static_shift": 3.0},
    "sqrt": {"shift": "sqrt_tokens", "base_tokens": 64},
    "flux": {"shift": "exponential", "base_tokens": 256},
}
TOKENS = 1024
MORE_NOISE = {"logit-normal", "beta", "mixture"}


@pytest.mark.parametrize(("density", "shift"), list(product(DENSITIES, SHIFTS)))
def test_times_have_the_closed_form_distribution(density, shift) -> None:
    config = TimestepConfig.model_validate({**DENSITIES[density], **SHIFTS[shift]})
    n = 20_000
    u = torch.rand(n, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    t = sample_times(u, TOKENS, config)
    points = torch.linspace(0, 1, 201, dtype=torch.float64)
    below = torch.tensor([share_below(float(p), TOKENS, config) for p in points])
    empirical = torch.searchsorted(t.double().sort().values, points, right=True) / n
    assert float((below - empirical).abs().max()) < 1.63 / math.sqrt(n)  # Kolmogorov-Smirnov, 1 %
    if density != "mixture":
        assert bool(
            (t.sort().values == t[u.argsort()]).all()
        )  # rises with u, so stratified numbers give stratified times
    if density in MORE_NOISE or shift != "none":
        assert float(t.mean()) > 0.53
    else:
        assert float(t.mean()) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("mean", [-1.0, 0.0, 1.0])
def test_logit_normal_against_scipy_and_its_sign(mean) -> None:
    u = torch.rand(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = sample_times(u, 64, TimestepConfig(mean=mean))
    assert kstest(torch.logit(t.double()).numpy(), "norm", args=(mean, 1.0)).pvalue > 0.01
    assert float(t.mean()) == pytest.approx({-1.0: 0.303, 0.0: 0.5, 1.0: 0.697}[mean], abs=0.003)


@pytest.mark.parametrize("density", DENSITIES)
def test_stratified_times_of_many_steps_have_the_same_distribution(density) -> None:
    config = TimestepConfig.model_validate({**DENSITIES[density], "shift": "none"})
    slots = tuple(range(8))
    t = torch.cat([sample_times(Randomness(0, s, slots).stratified("time"), 64, config) for s in range(1500)])
    for point in (0.1, 0.3, 0.5, 0.7, 0.9):
        assert float((t <= point).float().mean()) == pytest.approx(share_below(point, 64, config), abs=0.012)


def test_shift_identities_hold_to_1e_12() -> None:
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    k = torch.tensor([0.3, 1.0, 3.0], dtype=torch.float64).view(3, 1)
    close = {"atol": 1e-12, "rtol": 0}
    torch.testing.assert_close(apply_shift(apply_shift(t, k), 2.0), apply_shift(t, 2.0 * k), **close)
    torch.testing.assert_close(apply_shift(apply_shift(t, k), 1 / k), t.expand(3, -1), **close)
    torch.testing.assert_close(apply_shift(t, 1.0), t, **close)
    torch.testing.assert_close(apply_shift(t, k)[:, [0, -1]], t[[0, -1]].expand(3, -1), **close)
    z = torch.linspace(-8, 8, 101, dtype=torch.float64)
    torch.testing.assert_close(apply_shift(torch.sigmoid(z), k), torch.sigmoid(z + k.log()), **close)
    course = 1 - t  # the course's time runs the other way: t' = t / (k - (k - 1) t)
    torch.testing.assert_close(1 - apply_shift(t, 3.0), course / (3 - 2 * course), **close)
    one, many = (sample_times(t, 64, TimestepConfig(mean=m, shift=s, static_shift=2.0)) for m, s in
                 ((0.4, "static"), (0.4 + math.log(2), "none")))  # fmt: skip
    torch.testing.assert_close(one, many, atol=1e-6, rtol=0)  # handed out in float32


def test_shift_rules_and_their_anchors() -> None:
    flux = TimestepConfig(shift="exponential", base_tokens=256)
    assert [round(shift_of(n, flux), 3) for n in (256, 1024, 4096)] == [1.649, 1.878, 3.158]
    assert shift_of(4096, flux) == pytest.approx(math.exp(calculate_shift(4096)), rel=1e-12)
    assert shift_of(1000, flux) == pytest.approx(math.exp(calculate_shift(1000)), rel=1e-12)
    sd3 = TimestepConfig(base_tokens=256)
    assert (shift_of(256, sd3), shift_of(4096, sd3)) == (1.0, 4.0)
    assert all(shift_of(n, rule) < shift_of(n + 1, rule) for rule in (flux, sd3) for n in (64, 255, 5000))


def test_times_are_usable_at_both_ends() -> None:
    ends = torch.tensor([0.0, 1.0])
    for settings in DENSITIES.values():
        t = sample_times(ends, 4096, TimestepConfig.model_validate(settings))
        assert bool(torch.isfinite(t).all())
        assert 0 <= float(t[0]) < float(t[1]) <= 1


def test_histograms_add_up_and_lean_towards_noise() -> None:
    shares = histogram(64, TimestepConfig(mean=0.6))
    assert sum(shares) == pytest.approx(1, abs=1e-3)
    assert sum(shares[5:]) > 0.7
    assert len(bars(histogram(64, TimestepConfig(), 8))) == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"std": 0}, "greater than 0"),
        ({"mean": math.nan}, "finite"),
        ({"mean": math.inf}, "finite"),
        ({"density": "lognormal"}, "'uniform', 'logit_normal'"),
        ({"mode_scale": 1.76}, "less than or equal to 1.75"),
        ({"mode_scale": -1.1}, "greater than or equal to -1"),
        ({"static_shift": 0}, "greater than 0"),
        ({"base_tokens": 0}, "greater than or equal to 1"),
        ({"shift": "exponential", "base_tokens": 4096}, "max_tokens=4096 must be above base_tokens=4096"),
        ({"beta": (0, 1)}, "two numbers above 0"),
        ({"uniform_share": 1.5}, "less than or equal to 1"),
    ],
)
def test_impossible_settings_are_refused(settings, message) -> None:
    with pytest.raises(ValidationError, match=message):
        TimestepConfig.model_validate(settings)


# --- diffusers 0.42.1 ---


@pytest.mark.parametrize(
    ("scheme", "settings"),
    [("logit_normal", {"mean": 0.5, "std": 0.9}), ("mode", {"density": "mode", "mode_scale": 1.1})],
)
def test_densities_are_diffusers_after_its_turn_of_sign(scheme, settings) -> None:
    """diffusers' u indexes a falling table: its draw d is our time 1 - d for the same law."""
    settings = {"density": scheme, **settings, "shift": "none"}
    theirs = compute_density_for_timestep_sampling(
        scheme, 50_000, logit_mean=-settings.get("mean", 0.0), logit_std=settings.get("std", 1.0),
        mode_scale=settings.get("mode_scale"), generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    ours = sample_times(torch.rand(50_000, generator=torch.Generator().manual_seed(2)), 64,
                        TimestepConfig.model_validate(settings))  # fmt: skip
    assert kstest((1 - theirs).numpy(), ours.numpy()).pvalue > 0.01


def test_mode_is_diffusers_formula_to_the_bit() -> None:
    u = torch.rand(1000, generator=torch.Generator().manual_seed(3))
    theirs = compute_density_for_timestep_sampling(
        "mode", 1000, mode_scale=1.29, generator=torch.Generator().manual_seed(3)
    )
    assert torch.equal(mode_quantile(u, 1.29), theirs)


def test_the_static_table_is_diffusers() -> None:
    table = FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas
    ours = apply_shift(torch.arange(1000, 0, -1, dtype=torch.float64) / 1000, 3.0)
    torch.testing.assert_close(table.double(), ours, atol=2e-7, rtol=0)  # float32


def test_diffusers_shifts_twice_and_trains_unshifted_under_dynamic_shift() -> None:
    """Two faults of 0.42.1 that our own grid avoids (huggingface/diffusers #13243); a change there must be noticed here."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert float(scheduler.sigmas[-1]) == pytest.approx(0.002994, abs=1e-6)
    scheduler.set_timesteps(1000)
    assert float(scheduler.sigmas[-2]) == pytest.approx(0.008928, abs=1e-5)  # shifted twice
    dynamic = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    assert torch.equal(dynamic.sigmas, FlowMatchEulerDiscreteScheduler(shift=1.0).sigmas)


@pytest.mark.parametrize(("steps", "k"), list(product([2, 4, 8, 28], [1.0, 1.25, 2.0, 3.158])))
def test_the_exported_scheduler_makes_our_shifted_grid(steps, k) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**scheduler_settings(steps, k))
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(scheduler.sigmas.double(), torch.tensor(grid(steps, k), dtype=torch.float64),
                               atol=2e-7, rtol=0)  # fmt: skip

"""Time runs one way: closed-form flows against our sampler, our grids and the x_0-form of scores."""

from itertools import pairwise

import pytest
import torch

from models.distillation.grid import Schedule, sub_grids
from models.networks.denoiser import velocity_of
from models.pretraining.config import TimestepConfig
from models.sampling.euler import grid, integrate

NULL = (torch.zeros(1, 1, 4), torch.ones(1, 1, dtype=torch.bool))
Z = torch.linspace(-2.5, 2.5, 41, dtype=torch.float64).view(-1, 1, 1, 1)


def velocity(net, x, t):
    now = x.new_full((len(x),), t)
    return velocity_of(net(x, now)[0], x, now)


def runge_kutta(net, z, steps):
    x, h = z, 1.0 / steps
    for i in range(steps):
        t = 1 - i * h
        k1 = velocity(net, x, t)
        k2 = velocity(net, x - h / 2 * k1, t - h / 2)
        k3 = velocity(net, x - h / 2 * k2, t - h / 2)
        k4 = velocity(net, x - h * k3, t - h)
        x = x - h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def test_exact_velocity_carries_noise_to_the_quantile_map(mixture) -> None:
    """T1, with the order of the solver: a wrong velocity would not converge at order 4."""
    exact = mixture.end(Z)
    errors = [float((runge_kutta(mixture, Z, n) - exact).abs().max()) for n in (100, 200, 400)]
    assert errors[2] < 1e-6
    assert 12 < errors[0] / errors[1] < 20
    assert 12 < errors[1] / errors[2] < 20


def test_one_euler_step_lands_on_the_mean_of_the_data(mixture) -> None:
    """T2; the negative control runs time the other way and does not."""
    landed = integrate(mixture, Z, [1.0, 0.0], None, None, NULL, 1.0)
    assert float(landed.std()) < 1e-12
    assert float(landed.mean()) == pytest.approx(-2 * 0.3 + 0.5 * 0.5 + 2 * 0.2)
    flipped = Z + velocity(mixture, Z, 1.0)
    assert float(flipped.std()) > 1


def test_x_0_form_of_the_scores(gaussian) -> None:
    """T12: x_0_fake - x_0_real = t^2 / (1 - t) (s_fake - s_real) = t (v_real - v_fake)."""
    real, fake = gaussian(0.7, 0.3), gaussian(-0.2, 0.8)
    for t in (0.1, 0.5, 0.9):
        time = torch.tensor(t, dtype=torch.float64)
        left = fake.denoised(Z, time) - real.denoised(Z, time)
        scores = t**2 / (1 - t) * (fake.score(Z, time) - real.score(Z, time))
        velocities = t * (velocity(real, Z, t) - velocity(fake, Z, t))
        assert float((left - scores).abs().max()) < 1e-12
        assert float((left - velocities).abs().max()) < 1e-12
        assert float((left + scores).abs().max()) > 1e-3  # the wrong sign is seen


def test_every_second_time_of_a_shifted_grid_is_the_halved_grid() -> None:
    images = torch.zeros(1, 3, 80, 80)
    schedule = Schedule(TimestepConfig(shift="sqrt_tokens", base_tokens=64), 4)
    assert schedule.shift(images) == pytest.approx(2.5)
    for n in (1, 2, 4, 25):
        fine = schedule.at(torch.arange(2 * n, -1, -2), 2 * n, images)
        coarse = torch.tensor(grid(n, 2.5), dtype=fine.dtype)
        torch.testing.assert_close(fine, coarse, atol=1e-6, rtol=0)


def test_a_grid_falls_from_one_for_any_number_of_steps_and_none_has_none() -> None:
    for n in (1, 2, 3, 50):
        times = grid(n, 1.7)
        assert times[0] == 1.0
        assert times[-1] == 0.0
        assert all(a > b for a, b in pairwise(times))
    with pytest.raises(ValueError, match="steps=0 is below 1"):
        grid(0)


def test_step_counts_inside_a_grid() -> None:
    assert sub_grids(4) == (1, 2, 4)
    assert sub_grids(6) == (1, 2, 3, 6)

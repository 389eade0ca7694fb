"""Exact moments of every sampler on a Gaussian whose velocity is known: each step is affine, so no sampling is needed."""

import math
from itertools import pairwise

import pytest
import torch

from models.posttraining.sde import kl, log_prob, transition
from models.sampling.euler import grid, integrate

MEAN, STD = 1.0, 0.5


def velocity(x, t, mean=MEAN, cov=STD**2):
    """v = E[eps - x_0 | x_t] for one number, data N(mean, cov)."""
    spread = (1 - t) ** 2 * cov + t**2
    offset = (x - (1 - t) * mean) / spread
    return t * offset - (mean + (1 - t) * cov * offset)


def moments(sampler, n, eta, stochastic=lambda i: True, std=STD):
    """Mean and standard deviation of the pictures."""
    probe, mean, variance = torch.tensor([0.0, 1.0], dtype=torch.float64), 0.0, 1.0
    for i, (t, s) in enumerate(pairwise(grid(n, 3.0))):
        at = transition(sampler, probe, velocity(probe, t, cov=std**2), t, s, eta if stochastic(i) else 0.0)
        offset, slope = at[0][0].item(), (at[0][1] - at[0][0]).item()
        mean, variance = slope * mean + offset, slope**2 * variance + at[1] ** 2
    return mean, math.sqrt(variance)


@pytest.mark.parametrize("sampler", ["flow_sde", "ou"])
def test_marginals_converge_to_the_data(sampler) -> None:
    errors = {n: abs(moments(sampler, n, 0.7)[1] - STD) for n in (100, 200, 400, 800, 2000)}
    assert errors[2000] < 2e-3
    assert all(errors[n] / errors[2 * n] > 1.7 for n in (100, 200, 400))


@pytest.mark.parametrize("sampler", ["flow_sde", "cps", "ou"])
def test_means_are_exact(sampler) -> None:
    assert moments(sampler, 10, 0.7)[0] == pytest.approx(MEAN, abs=1e-5)


def test_cps_does_not_converge() -> None:
    assert moments("cps", 2000, 0.7)[1] == pytest.approx(0.4241, abs=1e-3)


def test_an_early_window_costs_ou_nothing_and_flow_sde_something() -> None:
    def early(i):
        return i in (1, 2)

    for n in (10, 40, 400):
        plain = moments("ou", n, 0.0)[1]
        assert moments("ou", n, 0.7, early)[1] == pytest.approx(plain, abs=1e-3)
        assert moments("flow_sde", n, 0.7, early)[1] > plain + 0.01


def test_sharp_data_stay_sharp_because_the_last_step_is_the_ode() -> None:
    assert moments("ou", 10, 0.7, std=0.05)[1] < 0.01
    assert moments("flow_sde", 10, 0.7, std=0.05)[1] < 0.01


@pytest.mark.parametrize("sampler", ["flow_sde", "ou"])
def test_a_correlated_gaussian_keeps_its_covariance(sampler) -> None:
    data = torch.tensor([[0.5, 0.35], [0.35, 0.4]], dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64)
    covariance = eye
    for t, s in pairwise(grid(1000, 3.0)):
        gain = torch.linalg.inv((1 - t) ** 2 * data + t**2 * eye)
        matrix = t * gain - (1 - t) * data @ gain
        step, std = transition(sampler, eye, matrix, t, s, 0.7)  # columns: images of the unit vectors, data mean 0
        covariance = step @ covariance @ step.T + std**2 * eye
    torch.testing.assert_close(covariance, data, atol=3e-3, rtol=0)


@pytest.mark.parametrize("sampler", ["flow_sde", "cps", "ou"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_no_noise_is_the_exported_scheduler_s_step(sampler, shift) -> None:
    """flow_sde to the bit; the others go through x_0 and x_1, which rounds differently."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(7)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 4, generator=generator)
    for time, (t, s) in zip(scheduler.timesteps, pairwise(scheduler.sigmas.tolist()), strict=True):
        v = torch.randn(2, 3, 4, 4, generator=generator)
        stock = scheduler.step(v, time, x).prev_sample
        mean, std = transition(sampler, x, v, t, s, 0.0)
        assert std == 0
        if sampler == "flow_sde":
            assert torch.equal(mean, stock)
        else:
            torch.testing.assert_close(mean, stock, atol=1e-6, rtol=0)
        x = stock


@pytest.mark.parametrize("sampler", ["flow_sde", "cps", "ou"])
def test_no_noise_is_the_ode_and_the_last_step_adds_none(sampler) -> None:
    generator = torch.Generator().manual_seed(0)
    x, v = (torch.randn(2, 3, 4, 4, generator=generator) for _ in range(2))
    for t, s in pairwise(grid(7, 2.0)):
        mean, std = transition(sampler, x, v, t, s, 0.0)
        assert std == 0
        torch.testing.assert_close(mean, x + (s - t) * v, atol=1e-6, rtol=0)
        if sampler == "flow_sde":
            assert torch.equal(mean, x + v * (s - t))
    mean, std = transition(sampler, x, v, 0.3, 0.0, 0.7)
    assert std == 0
    assert torch.equal(mean, x - 0.3 * v)


def test_the_ode_is_the_sampler_of_inference(tiny, sampling, batches) -> None:
    batch, net = batches(0), tiny(0)
    noise = torch.randn(batch.images.shape, generator=torch.Generator().manual_seed(0))
    times = sampling.times(5, noise)
    stock = integrate(net, noise, times, batch.tokens, batch.mask, sampling.null, sampling.guidance)
    with torch.no_grad():
        ours = sampling.follow(net, noise, times, batch)
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-5)


def test_log_prob_is_the_normal_density_per_element() -> None:
    generator = torch.Generator().manual_seed(0)
    x, mean = (torch.randn(2, 3, 4, 4, generator=generator) for _ in range(2))
    expected = torch.distributions.Normal(mean, 0.3).log_prob(x).mean((1, 2, 3))
    torch.testing.assert_close(log_prob(x, mean, 0.3), expected)
    with pytest.raises(ValueError, match="bfloat16"):
        log_prob(x.bfloat16(), mean, 0.3)


def test_kl_is_that_of_two_normals_per_element() -> None:
    a, b = torch.zeros(2, 3, 4, 4), torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    normals = torch.distributions.Normal(a, 0.3), torch.distributions.Normal(b, 0.3)
    torch.testing.assert_close(kl(a, b, 0.3), torch.distributions.kl_divergence(*normals).mean((1, 2, 3)))


def test_times_must_descend() -> None:
    x = torch.zeros(1, 3, 4, 4)
    with pytest.raises(ValueError, match="descending"):
        transition("ou", x, x, 0.2, 0.5, 0.7)

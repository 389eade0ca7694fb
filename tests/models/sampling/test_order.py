"""Order of the samplers on a closed form: data N(m, s^2), whose flow takes eps to m + s eps exactly."""

import math
from itertools import pairwise

import pytest
import torch

from models.networks.denoiser import Denoiser
from models.sampling.euler import euler_step, grid, integrate
from models.sampling.heun import heun_step

MEAN, STD = 0.7, 0.5
STEPS = (10, 20, 40, 80)


class Gaussian(Denoiser):
    """The best velocity there is for N(m, s^2), in double precision."""

    def __init__(self) -> None:
        super().__init__(None, "velocity")
        self.looks = 0

    def predict(self, x_t, t, tokens, mask, hidden_layer=None, condition=None, route=None):
        self.looks += 1
        t = t.view(-1, 1, 1, 1)
        slope = (t - (1 - t) * STD**2) / ((1 - t) ** 2 * STD**2 + t**2)
        return slope * (x_t - (1 - t) * MEAN) - MEAN, None


@pytest.mark.parametrize(("step", "order"), [(euler_step, 1), (heun_step, 2)], ids=["euler", "heun"])
def test_halving_the_steps_divides_the_error_by_two_to_the_order(step, order) -> None:
    eps = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    text = (torch.zeros(1, 1, 1), torch.ones(1, 1, dtype=torch.bool))
    errors = []
    for steps in STEPS:
        denoiser = Gaussian()
        drawn = integrate(denoiser, eps, grid(steps), *text, text, 1.0, step)
        errors.append(float((drawn - (MEAN + STD * eps)).square().mean().sqrt()))
        assert denoiser.looks == (steps if order == 1 else 2 * steps - 1)
    slopes = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert all(abs(slope - order) < 0.15 for slope in slopes)
    assert abs(slopes[-1] - order) < 0.06

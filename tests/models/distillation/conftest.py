"""Worlds whose flow is known in closed form, as networks the objectives take: x_0 [B, C, 1, 1] from x_t and t [B]."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from models.engine.objective import Batch
from models.networks.denoiser import T_CLAMP, Denoiser

MEANS, STD, WEIGHTS = (-2.0, 0.5, 2.0), 0.3, (0.3, 0.5, 0.2)


class Gaussian(Denoiser):
    """Data N(mean, std^2) in every element; the exact denoiser. `told` swallows a student's extra scalar."""

    def __init__(self, mean: float = 0.7, std: float = 0.3) -> None:
        super().__init__()
        self.mean, self.std = mean, std

    def spread(self, t):
        return ((1 - t) ** 2 * self.std**2 + t**2).sqrt()

    def score(self, x, t):
        return -(x - (1 - t) * self.mean) / self.spread(t) ** 2

    def end(self, x, t):
        """Where the flow through x at t ends: the consistency function."""
        return self.mean + self.std / self.spread(t) * (x - (1 - t) * self.mean)

    def at(self, x, t, s):
        """Where it passes at s."""
        return (1 - s) * self.mean + self.spread(s) / self.spread(t) * (x - (1 - t) * self.mean)

    def denoised(self, x, t):
        return self.mean + (1 - t) * self.std**2 / self.spread(t) ** 2 * (x - (1 - t) * self.mean)

    def velocity(self, x, t):
        return t / self.spread(t) ** 2 * (x - (1 - t) * self.mean) - self.denoised(x, t)

    def forward(self, x_t, t, tokens=None, mask=None, *told):
        t = t.view(-1, 1, 1, 1).to(x_t.dtype)
        return x_t - t.clamp_min(T_CLAMP) * self.velocity(x_t, t), None

    predict = forward


class Mixture(Denoiser):
    """Data from three normals on a line (world A); the exact flow is the monotone quantile map."""

    def velocity(self, x_t, t):
        means, weights = (torch.tensor(v, dtype=x_t.dtype) for v in (MEANS, WEIGHTS))
        x, t = x_t[..., None], t[..., None]
        variance = (1 - t) ** 2 * STD**2 + t**2
        offset = x - (1 - t) * means
        share = torch.softmax(weights.log() - offset**2 / (2 * variance), -1)
        x_0, eps = means + (1 - t) * STD**2 / variance * offset, t / variance * offset
        return (share * (eps - x_0)).sum(-1)

    def forward(self, x_t, t, tokens=None, mask=None, *told):
        t = t.view(-1, 1, 1, 1).to(x_t.dtype)
        return x_t - t.clamp_min(T_CLAMP) * self.velocity(x_t, t), None

    predict = forward

    def cdf(self, x, t):
        """Distribution function at time t."""
        means, weights = (torch.tensor(v, dtype=x.dtype) for v in (MEANS, WEIGHTS))
        std = math.sqrt((1 - t) ** 2 * STD**2 + t**2)
        return (weights * torch.special.ndtr((x[..., None] - (1 - t) * means) / std)).sum(-1)

    def end(self, z):
        """F_0^-1(F_1(z)) by bisection."""
        level = torch.special.ndtr(z)
        low, high = torch.full_like(z, -6.0), torch.full_like(z, 6.0)
        for _ in range(80):
            middle = (low + high) / 2
            below = self.cdf(middle, 0.0) < level
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def table(self):
        """The same map, interpolated between 2,001 points (error < 1e-4): for training."""
        z = torch.linspace(-5, 5, 2001, dtype=torch.float64)
        ends = self.end(z)

        def look_up(noise):
            place = ((noise.double() + 5) * 200).clamp(0, 1999.999)
            low = place.long()
            return (ends[low] + (place - low) * (ends[low + 1] - ends[low])).float()

        return look_up

    def draw(self, count, generator):
        kind = torch.multinomial(torch.tensor(WEIGHTS), count, True, generator=generator)
        return (torch.tensor(MEANS)[kind] + STD * torch.randn(count, generator=generator)).view(-1, 1, 1, 1)


class Mlp(Denoiser):
    """A student on the line; the last layer is small, extra scalars are inputs."""

    def __init__(self, width: int = 64, inputs: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, 1),
        )  # fmt: skip

    def forward(self, x_t, t, tokens=None, mask=None, *told):
        columns = [x_t.flatten(), t, *told]
        return self.net(torch.stack(columns, 1)).view(-1, 1, 1, 1), None

    predict = forward


@pytest.fixture
def line() -> Callable[[torch.Tensor], Batch]:
    """A batch of numbers [B] as pictures [B, 1, 1, 1]."""

    def batch(values: torch.Tensor, **extra: torch.Tensor) -> Batch:
        b = len(values)
        return Batch(values.view(-1, 1, 1, 1), torch.zeros(b, 1, 4), torch.ones(b, 1, dtype=torch.bool),
                     tuple(range(b)), extra=extra)  # fmt: skip

    return batch


@pytest.fixture
def gaussian() -> type[Gaussian]:
    return Gaussian


@pytest.fixture
def mixture() -> Mixture:
    return Mixture()


@pytest.fixture
def mlp() -> type[Mlp]:
    return Mlp

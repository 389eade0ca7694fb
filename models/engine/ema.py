"""Averages of weights: the power function (Karras et al. 2024, arXiv:2312.02696, eq. 2), or a constant decay with warm-up.

Post-hoc EMA (section 3.2 of that paper): snapshots of two power averages let any other profile be put together afterwards,
as the least-squares combination of the stored ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from models.engine.shard import cut, part_of

SNAPSHOT_GAMMAS = (17.97, 7.94)  # relative widths 0.05 and 0.10; our gamma is the paper's plus one


class PowerEma:
    """average <- beta_k * average + (1 - beta_k) * weights, beta_k = (1 - 1/(k+1))^gamma after the k-th update.

    With a `decay` beta_k = min(decay, k / (9 + k)) instead: diffusers' EMAModel, whose first update copies the weights.
    """

    def __init__(self, module: nn.Module, gamma: float, decay: float | None = None) -> None:
        self.gamma, self.decay = gamma, decay
        self.updates = 0
        self.trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.average = {name: part_of(p).clone() for name, p in self.trained.items()}

    def beta(self) -> float:
        """How much of the average stays at the present number of updates."""
        if self.decay is not None:
            n = self.updates - 1
            return 0.0 if n == 0 else min(self.decay, (1 + n) / (10 + n))
        return (1 - 1 / (self.updates + 1)) ** self.gamma if self.gamma > 0 else 0.0

    def load(self, average: Mapping[str, torch.Tensor]) -> None:
        """Go on from a stored average, this worker keeping its parts of cut weights."""
        self.average = {name: cut(average[name].to(p.device), p) for name, p in self.trained.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Fold the present weights into the average."""
        self.updates += 1
        present = [part_of(p) for p in self.trained.values()]
        torch._foreach_lerp_(list(self.average.values()), present, 1 - self.beta())


def synthesis(snapshots: Sequence[tuple[float, float]], gamma: float, at: float) -> NDArray[np.float64]:
    """Weights [len(snapshots)], 1 in all, that make of power averages (gamma_i, steps t_i) the one of `gamma` after `at` steps.

    Profiles p_i(s) = gamma_i s^(gamma_i - 1) / t_i^gamma_i on [0, t_i] are fitted in least squares (their algorithm 3), here
    under the condition that the sum is an average again: a sum of 1.002 is an error of .002 in every weight that is 1.
    """
    gram, target, _ = _products(snapshots, gamma, at)
    one = np.ones((len(target), 1))
    system = np.block([[gram, one], [one.T, np.zeros((1, 1))]])
    solved = np.linalg.lstsq(system, np.append(target, 1.0), rcond=None)[0]
    return np.asarray(solved[:-1], np.float64)


def misfit(snapshots: Sequence[tuple[float, float]], gamma: float, at: float) -> float:
    """Distance of the profile that `synthesis` makes from the one asked for, over the latter's norm."""
    gram, target, norm = _products(snapshots, gamma, at)
    weights = synthesis(snapshots, gamma, at)
    missed = float(weights @ gram @ weights) - 2 * float(weights @ target) + norm
    return math.sqrt(max(0.0, missed / norm))


def _products(
    snapshots: Sequence[tuple[float, float]], gamma: float, at: float
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Inner products of the snapshots' profiles, of these with the one asked for, and of that one with itself."""
    powers = np.array([g - 1 for g, _ in snapshots])  # beta = (1 - 1/n)^gamma leaves the profile s^(gamma - 1)
    ends = np.array([t for _, t in snapshots])
    power, end = np.array([gamma - 1]), np.array([at], np.float64)
    target = _product(powers, ends, power, end)[:, 0]
    return _product(powers, ends, powers, ends), target, float(_product(power, end, power, end)[0, 0])


def _product(g: NDArray[np.float64], t: NDArray[np.float64], h: NDArray[np.float64], u: NDArray[np.float64]) -> NDArray[np.float64]:  # fmt: skip
    """Inner products [len(g), len(h)] of the profiles."""
    g, t, h, u = g[:, None], t[:, None], h[None], u[None]
    least = np.minimum(t, u)
    return (g + 1) * (h + 1) / (g + h + 1) * (least / t) ** g * (least / u) ** h * least / (t * u)


def combined(averages: Sequence[Mapping[str, torch.Tensor]], weights: NDArray[np.float64]) -> dict[str, torch.Tensor]:
    """The weighted sum of snapshots, summed in float64."""
    factors = torch.from_numpy(weights)
    return {
        name: torch.tensordot(factors, torch.stack([average[name].double() for average in averages]), 1).to(value.dtype)
        for name, value in averages[0].items()
    }

"""The irreducible loss on N(0, 1): what a network reaches by training, and never passes.

x_t = (1-t) x_0 + t eps has variance s(t) = (1-t)^2 + t^2, the best guess of the velocity is (2t - 1) / s(t) x_t, and what is
left of its error is 1 / s(t). An average below it, beyond chance, means that the target leaks into what the network sees.
"""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from models.engine.config import OptimizerConfig, TrainConfig
from models.engine.loop import train
from models.engine.objective import Batch
from models.engine.randomness import Randomness
from models.networks.denoiser import Denoiser
from models.pretraining.config import TimestepConfig
from models.pretraining.densities import share_below
from models.pretraining.flow_matching import FlowMatching

SHAPE = (3, 4, 4)
KNOTS = 33
UNIFORM = TimestepConfig(density="uniform", shift="none")
CASES = {
    "uniform": (UNIFORM, "velocity", math.pi / 2),
    "uniform-x_0": (UNIFORM, "x_0", None),
    "logit-normal": (TimestepConfig(shift="none"), "velocity", 1.7413),
    "shifted": (TimestepConfig(density="uniform", base_tokens=4), "velocity", None),  # 16 tokens: k = 2
}


def spread(t: torch.Tensor) -> torch.Tensor:
    """Variance of x_t."""
    return (1 - t) ** 2 + t**2


class Linear(Denoiser):
    """Linear in x_t, by a factor that is linear in t between knots; starts at 0."""

    patch_size = 1

    def __init__(self, prediction) -> None:
        super().__init__(prediction=prediction)
        self.factors = nn.Parameter(torch.zeros(KNOTS))

    def predict(self, x_t, t, tokens, mask, hidden_layer=None, condition=None, route=None):
        hats = (1 - ((KNOTS - 1) * t[:, None] - torch.arange(KNOTS)).abs()).clamp_min(0)  # [B, KNOTS]
        return (hats @ self.factors).view(-1, 1, 1, 1) * x_t, None


class Best(Linear):
    """The conditional expectation."""

    def predict(self, x_t, t, tokens, mask, hidden_layer=None, condition=None, route=None):
        factor = (1 - t if self.prediction == "x_0" else 2 * t - 1) / spread(t)
        return factor.view(-1, 1, 1, 1) * x_t, None


def batch_of(slots: tuple[int, ...]):
    text = torch.zeros(len(slots), 1, 1), torch.ones(len(slots), 1, dtype=torch.bool)
    return lambda step: Batch(Randomness(1, step, slots).normal("data", SHAPE), *text, slots)


def floor(config: TimestepConfig, clamp: float) -> float:
    """Mean of 1 / s(t) over the density; the part below the clamp counts less."""
    edges = [i / 4000 for i in range(4001)]
    shares = torch.tensor(
        [share_below(edge, math.prod(SHAPE[1:]), config) for edge in edges], dtype=torch.float64
    ).diff()
    t = torch.tensor(edges, dtype=torch.float64)[:-1] + 1 / 8000
    return float((shares / spread(t) * (t / t.clamp_min(clamp)) ** 2).sum())


@torch.no_grad()
def asked(objective: FlowMatching, first: int = 10_000) -> tuple[float, float]:
    """Mean loss over fresh batches and its standard error."""
    slots = tuple(range(250))
    batches = batch_of(slots)
    losses = torch.stack([
        objective.loss("denoiser", objective.prepare(batches(step), Randomness(0, step, slots))).total
        for step in range(first, first + 12)
    ]).double()  # fmt: skip
    return float(losses.mean()), float(losses.std() / math.sqrt(len(losses)))


@pytest.mark.parametrize("case", CASES)
def test_the_best_guess_has_the_floors_loss_and_training_ends_just_above_it(case, tmp_path: Path) -> None:
    times, prediction, anchor = CASES[case]
    objective = FlowMatching(Best(prediction), times)
    least = floor(times, objective.denoiser.t_clamp)
    if anchor is not None:
        assert least == pytest.approx(anchor, abs=1e-3)
    mean, error = asked(objective)
    assert mean == pytest.approx(least, abs=4 * error)

    optimizer = OptimizerConfig(muon_lr=None, adamw_lr=0.05, warmup_steps=5, decay_from=0.3)
    config = TrainConfig(
        steps=150, batch_size=16, log_every=10, checkpoint_every=150, ema_gamma=0.0, optimizer=optimizer
    )
    learner = FlowMatching(Linear(prediction), times)
    first, *_ = train(learner, batch_of(tuple(range(16))), config, tmp_path).rows
    mean, error = asked(learner)
    assert least - 4 * error <= mean <= least + 0.03 < first["loss"]

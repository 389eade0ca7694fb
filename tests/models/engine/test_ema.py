"""Averages against diffusers' EMAModel and, chosen afterwards, against the average tracked all along."""

import math

import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from models.engine.ema import SNAPSHOT_GAMMAS, PowerEma, combined, misfit, synthesis


def walk(step: int) -> torch.Tensor:
    return torch.sin(torch.tensor([step / 40.0, step / 90.0, step / 300.0]))


def test_the_constant_decay_is_diffusers_over_1000_steps() -> None:
    layer = nn.Linear(3, 1, bias=False)
    ours, theirs = PowerEma(layer, 0.0, decay=0.995), EMAModel(layer.parameters(), decay=0.995)
    for step in range(1000):
        with torch.no_grad():
            layer.weight.copy_(walk(step)[None])
        ours.update()
        theirs.step(layer.parameters())
        torch.testing.assert_close(ours.average["weight"], theirs.shadow_params[0], atol=1e-6, rtol=0)


def test_an_average_chosen_afterwards_is_the_one_tracked_all_along() -> None:
    layer = nn.Linear(3, 1, bias=False)
    stored, wanted = [PowerEma(layer, g) for g in SNAPSHOT_GAMMAS], PowerEma(layer, 10.0)
    places, averages = [], []
    for step in range(1, 1001):
        with torch.no_grad():
            layer.weight.copy_(walk(step)[None])
        for ema in (*stored, wanted):
            ema.update()
        if step % 100 == 0:
            places += [(ema.gamma, float(step)) for ema in stored]
            averages += [{"weight": ema.average["weight"].clone()} for ema in stored]
    made = combined(averages, synthesis(places, 10.0, 1000.0))["weight"]
    assert float((made - wanted.average["weight"]).abs().max()) < 0.005
    assert float((averages[-1]["weight"] - wanted.average["weight"]).abs().max()) > 0.02
    assert synthesis(places, SNAPSHOT_GAMMAS[0], 1000.0)[-2] == pytest.approx(1, abs=1e-6)
    assert misfit(places, SNAPSHOT_GAMMAS[0], 1000.0) < 1e-3
    assert misfit(places, 10.0, 1000.0) < 0.02
    assert synthesis(places, 10.0, 1000.0).sum() == pytest.approx(1, abs=1e-12)  # weights that never move stay
    far = np.linspace(0, 500, 200_001)[1:] / 500  # against the integral: one snapshot of another power at the same step
    have, want = far**6.94, far**2.0
    have, want = have / have.sum(), want / want.sum()
    by_hand = math.sqrt(((have - want) ** 2).sum() / (want**2).sum())
    assert misfit([(7.94, 500.0)], 3.0, 500.0) == pytest.approx(by_hand, rel=1e-3)

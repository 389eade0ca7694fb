"""The meter counts what is known: the arithmetic of a linear layer, once a shape, and the shares of the time."""

import pytest
import torch
from torch import nn

from models.engine.meter import Meter
from models.engine.objective import Batch

PEAK = 1e6


def batch(samples: int, tokens: int) -> Batch:
    return Batch(torch.zeros(samples, 3, 4, 4), torch.zeros(samples, tokens, 7), torch.ones(samples, tokens, dtype=torch.bool), tuple(range(samples)))  # fmt: skip


def test_a_step_is_three_forward_passes_of_what_the_layer_is_known_to_cost(monkeypatch) -> None:
    monkeypatch.setattr("models.engine.meter.matmul_peak", lambda dtype: PEAK)
    meter, layer, asked = Meter(), nn.Linear(7, 5), []

    def forward(one: Batch) -> None:
        asked.append(one.tokens.shape)
        layer(one.tokens)

    for one in (batch(2, 3), batch(2, 3), batch(4, 6)):
        meter.counted(one, lambda one=one: forward(one))
    assert asked == [(2, 3, 7), (4, 6, 7)]  # once a shape
    flops = 3 * 2 * 7 * 5 * (2 * 3 + 2 * 3 + 4 * 6)
    assert meter.flops == flops
    meter.seconds |= {"step": 0.5, "data": 0.3, "checkpoint": 0.2}
    assert meter.numbers() == pytest.approx(
        {"samples_per_second": 8.0, "mfu": flops / 0.5 / PEAK, "data_wait": 0.3, "checkpoint_stall": 0.2}
    )


def test_nothing_is_told_before_the_first_step() -> None:
    assert Meter().numbers() == {}

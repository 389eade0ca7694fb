"""The validation loss: a known value, nothing drawn anew, no trace in the training."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.engine.config import TrainConfig
from models.engine.loop import train
from models.networks.denoiser import Denoiser
from models.pretraining.config import FlowMatchingConfig, TimestepConfig
from models.pretraining.flow_matching import FlowMatching
from models.pretraining.validation import TIMES, Validation


class Best(Denoiser):
    """The best velocity there is for N(0, 1): (2t - 1) / ((1-t)^2 + t^2) x."""

    def __init__(self) -> None:
        super().__init__(None, "velocity")

    def predict(self, x_t, t, tokens, mask, hidden_layer=None, condition=None, route=None):
        t = t.view(-1, 1, 1, 1)
        return (2 * t - 1) / ((1 - t) ** 2 + t**2) * x_t, None


def test_the_best_network_has_the_gaussian_floor_at_each_time(batches) -> None:
    batch = batches(0, tuple(range(64)))
    images = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    numbers = Validation(Best(), [replace(batch, images=images, rows=tuple(range(64)))], 1, 0).numbers()
    floors = [1 / ((1 - t) ** 2 + t**2) for t in ((i + 0.5) / TIMES for i in range(TIMES))]
    assert [numbers[f"validation t={(i + 0.5) / TIMES:g}"] for i in range(TIMES)] == pytest.approx(floors, rel=0.02)
    assert numbers["validation"] == pytest.approx(sum(floors) / TIMES, rel=0.01)


def test_it_does_not_depend_on_the_batches_and_leaves_no_trace(tiny, batches, tmp_path: Path) -> None:
    config = TrainConfig(steps=4, batch_size=4, log_every=1, checkpoint_every=2, ema_gamma=3.0)

    def run(folder: str, validated: bool):
        denoiser = tiny(0)
        held_out = [replace(batches(99), rows=(0, 1, 2, 3))]
        look = Validation(denoiser, held_out, 2, 0) if validated else None
        return train(
            FlowMatching(denoiser, TimestepConfig(base_tokens=4)), batches, config, tmp_path / folder, measure=look
        )

    plain, looked = run("plain", False), run("looked", True)
    for name, value in plain.players["denoiser"].state_dict().items():
        assert torch.equal(value, looked.players["denoiser"].state_dict()[name])
    assert ["validation" in row for row in looked.rows] == [False, True, False, True]
    assert [{k: v for k, v in row.items() if "validation" not in k} for row in looked.rows] == plain.rows
    assert looked.rows[1]["validation"] != looked.rows[3]["validation"]

    whole, denoiser = replace(batches(99), rows=(0, 1, 2, 3)), tiny(0)
    cut = [
        replace(whole, images=whole.images[i], tokens=whole.tokens[i], mask=whole.mask[i], rows=whole.rows[i])
        for i in (slice(0, 1), slice(1, 4))
    ]
    one, two = Validation(denoiser, [whole], 1, 0).numbers(), Validation(denoiser, cut, 1, 0).numbers()
    assert one == pytest.approx(two, rel=1e-5)
    with pytest.raises(ValueError, match="validation.every=30 is not a multiple of train.log_every=20"):
        FlowMatchingConfig.model_validate({"validation": {"every": 30}})

"""Sampling, prompts in groups, and rewards small enough for a test."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from models.engine.objective import Batch
from models.posttraining.reward import RewardCard
from models.posttraining.rollout import Sampling
from models.pretraining.config import TimestepConfig


class Brightness:
    """Mean of the pixels: differentiable, different for every picture."""

    card = RewardCard("brightness", -1.0, 1.0, "trained", 0.0, 0.1)

    def __call__(self, pictures: torch.Tensor, asked: Batch) -> torch.Tensor:
        return pictures.mean((1, 2, 3))


class Same:
    """One number for all pictures; a third, so that a mean of equals is not exact."""

    card = RewardCard("same", 0.0, 1.0, "trained")

    def __call__(self, pictures: torch.Tensor, asked: Batch) -> torch.Tensor:
        return torch.full((len(pictures),), 1 / 3)


@pytest.fixture
def brightness() -> Brightness:
    return Brightness()


@pytest.fixture
def same() -> Same:
    return Same()


@pytest.fixture
def sampling() -> Sampling:
    null = (torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(3)), torch.ones(1, 3, dtype=torch.bool))
    return Sampling(null, 1.7, TimestepConfig(base_tokens=4))


@pytest.fixture
def grouped(batches: Callable[..., Batch]) -> Callable[..., Batch]:
    """Two groups of four neighbouring slots, one prompt a group; real pictures beside them."""

    def batch(step: int, slots: tuple[int, ...] = tuple(range(8)), group: int = 4) -> Batch:
        made = batches(step, tuple(slot // group for slot in slots))
        real = batches(step + 1000, slots)
        extra = {"real": real.images, "real_tokens": real.tokens, "real_mask": real.mask}
        return replace(made, images=torch.zeros_like(made.images), slots=slots, extra=extra)

    return batch

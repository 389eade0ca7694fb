"""A denoiser small enough for a test, and a batch for it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from models.engine.objective import Batch
from models.engine.randomness import Randomness
from models.networks import prx
from models.networks.config import PrxConfig
from models.networks.denoiser import Denoiser

TINY = PrxConfig(hidden_size=32, depth=3, num_heads=2, patch_size=4, text_dim=16, mlp_ratio=2.0, prompt_max_tokens=16)


def awake(denoiser: Denoiser, seed: int = 1) -> Denoiser:
    """Give the zero-initialised layers some weight, so that outputs depend on everything."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            if not parameter.any():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return denoiser


@pytest.fixture
def tiny() -> Callable[[int], Denoiser]:
    def make(seed: int = 0) -> Denoiser:
        generator = torch.Generator().manual_seed(99)
        mean = torch.randn(16, generator=generator)
        std = 0.5 + torch.rand(16, generator=generator)
        return awake(prx.build(TINY, mean, std, seed))

    return make


@pytest.fixture
def batches() -> Callable[[int], Batch]:
    def batch(step: int, slots: tuple[int, ...] = (0, 1, 2, 3)) -> Batch:
        rng = Randomness(5, step, slots)
        tokens = rng.normal("tokens", (6, 16))
        mask = torch.arange(6) < (2 + rng.uniform("length") * 5).long()[:, None]
        images = rng.uniform("images", (3, 8, 12)) * 2 - 1
        teacher = rng.normal("teacher", (2, 3, 10))
        prior = torch.tensor([slot % 2 == 1 for slot in slots])
        extra = {"loser": rng.uniform("loser", (3, 8, 12)) * 2 - 1, "prior": prior}
        return Batch(images, tokens, mask, slots, teacher, extra=extra)

    return batch


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    return tmp_path / "scratch"

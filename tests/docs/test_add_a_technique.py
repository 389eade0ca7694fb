"""The tutorial's objective is run as it stands there: it reaches its closed form and resumes to the bit."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from models.engine.config import OptimizerConfig, TrainConfig
from models.engine.loop import train
from models.engine.objective import Batch
from models.networks import prx
from models.networks.config import PrxConfig

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tutorials" / "add-a-technique.md"
TINY = PrxConfig(hidden_size=32, depth=1, num_heads=2, patch_size=4, text_dim=16, mlp_ratio=2.0, prompt_max_tokens=8)
PICTURE = torch.linspace(-0.8, 0.8, 3 * 8 * 8).reshape(1, 3, 8, 8)


@pytest.fixture(scope="module")
def technique() -> Any:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    names: dict[str, Any] = {"__name__": "tutorial"}
    exec(compile(code, str(PAGE), "exec"), names)
    return names["PseudoHuber"]


def batch(step: int) -> Batch:
    return Batch(PICTURE.repeat(4, 1, 1, 1), torch.zeros(4, 2, 16), torch.ones(4, 2, dtype=torch.bool), (0, 1, 2, 3))


def trained(technique: Any, folder: Path, steps: int, stop: int | None = None) -> Any:
    denoiser = prx.build(TINY, torch.zeros(16), torch.ones(16), seed=0)
    config = TrainConfig(steps=steps, batch_size=4, log_every=4, checkpoint_every=4,
                         optimizer=OptimizerConfig(muon_lr=None, adamw_lr=3e-3, warmup_steps=5))  # fmt: skip

    def batches(step: int) -> Batch:
        if step == stop:
            raise KeyboardInterrupt
        return batch(step)

    try:
        return train(technique(denoiser, 0.1), batches, config, folder), denoiser
    except KeyboardInterrupt:
        return trained(technique, folder, steps)


def test_it_reaches_the_one_picture_there_is(technique, tmp_path):
    trainer, denoiser = trained(technique, tmp_path, 200)
    assert trainer.rows[-1]["huber"] < 0.15 * trainer.rows[0]["huber"]
    noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        drawn = denoiser(noise, torch.ones(1), torch.zeros(1, 2, 16), torch.ones(1, 2, dtype=torch.bool))[0]
    assert (drawn - PICTURE).abs().mean() < 0.1


def test_it_resumes_to_the_bit(technique, tmp_path):
    whole, cut = (trained(technique, tmp_path / name, 12, stop) for name, stop in (("whole", None), ("cut", 8)))
    assert whole[0].rows == cut[0].rows
    for one, other in zip(whole[1].parameters(), cut[1].parameters(), strict=True):
        assert torch.equal(one, other)

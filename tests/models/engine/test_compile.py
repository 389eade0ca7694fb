"""`compile`: the same training to rounding, the same names, the same bits after a cut; a minute of a C++ compiler."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from models.engine.config import OptimizerConfig, TrainConfig
from models.engine.loop import Trainer, train
from models.engine.objective import Batch
from models.engine.state import load_state
from models.networks import prx
from models.networks.config import PrxConfig
from models.pretraining.config import TimestepConfig
from models.pretraining.flow_matching import FlowMatching

NETWORK = PrxConfig(
    hidden_size=32, depth=1, num_heads=2, patch_size=4, text_dim=16, mlp_ratio=2.0, prompt_max_tokens=16
)
STEPS, CUT = 4, 2


class KilledError(Exception):
    """Stands for a killed process."""


def run(batches: Callable[[int], Batch], folder: Path, compiled: bool, cut: int | None = None) -> Trainer:
    optimizer = OptimizerConfig(warmup_steps=1, muon_lr=None)
    config = TrainConfig(
        steps=STEPS, batch_size=4, log_every=1, checkpoint_every=1, ema_gamma=3.0, optimizer=optimizer, compile=compiled
    )

    def batch(step: int) -> Batch:
        if step == cut:
            raise KilledError
        return batches(step)

    denoiser = prx.build(NETWORK, torch.zeros(16), torch.ones(16), 0)
    return train(FlowMatching(denoiser, TimestepConfig(base_tokens=4)), batch, config, folder)


@pytest.mark.lifecycle
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
def test_compiled_blocks_train_as_plain_ones_and_resume_to_the_bit(batches, tmp_path: Path) -> None:
    plain = run(batches, tmp_path / "plain", False)
    compiled = run(batches, tmp_path / "compiled", True)
    want, got = (trainer.players["denoiser"].state_dict() for trainer in (plain, compiled))
    assert list(want) == list(got)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, atol=1e-4, rtol=0)
    blocks = compiled.players["denoiser"].denoiser.transformer.blocks
    assert all(block._compiled_call_impl is not None for block in blocks)
    with pytest.raises(KilledError):
        run(batches, tmp_path / "broken", True, CUT)
    resumed = run(batches, tmp_path / "broken", True)
    assert resumed.rows == compiled.rows
    stored = [load_state(tmp_path / name / "checkpoints") for name in ("compiled", "broken")]
    for group, tensors in stored[0][1].items():  # type: ignore[index]
        assert all(torch.equal(value, stored[1][1][group][name]) for name, value in tensors.items())  # type: ignore[index]

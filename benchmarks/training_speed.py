"""The training loop against its limit: forward and backward of the same network on the same batches, nothing else.

value: seconds of one step of the loop (data, noise, REPA, Muon and AdamW, averages), one process on one thread;
peer: forward and backward alone. Medians, taken in turn.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.record import record
from models.engine.config import TrainConfig
from models.engine.loop import Trainer
from models.engine.objective import Batch
from models.engine.randomness import Randomness
from models.networks import prx
from models.networks.config import PrxConfig
from models.pretraining.config import RepaConfig, TimestepConfig
from models.pretraining.flow_matching import FlowMatching
from models.pretraining.repa import Projector, Repa

BATCH, TOKENS, ROUNDS, BAR = 12, 20, 40, 2.0


def batch_of(step: int) -> Batch:
    """Random pictures, text and teacher features."""
    g = torch.Generator().manual_seed(step)
    return Batch(
        torch.rand(BATCH, 3, 32, 32, generator=g) * 2 - 1, torch.randn(BATCH, TOKENS, 384, generator=g),
        torch.ones(BATCH, TOKENS, dtype=torch.bool), tuple(range(BATCH)), torch.randn(BATCH, 8, 8, 40, generator=g),
    )  # fmt: skip


def demo_trainer(folder: Path) -> Trainer:
    """Flow matching with REPA of the demo's network, from random weights."""
    network = PrxConfig(depth=4)
    denoiser = prx.build(network, torch.zeros(384), torch.ones(384), seed=0)
    repa = Repa(RepaConfig(layer=1, until=1.0), Projector(network.hidden_size, 192, 40, 0), steps=10_000)
    objective = FlowMatching(denoiser, TimestepConfig(), repa)
    return Trainer(objective, TrainConfig(steps=10_000, batch_size=BATCH), folder)


def main() -> dict[str, Any]:
    """Alternate whole steps with bare ones."""
    torch.set_num_threads(1)
    whole, bare = [], []
    with TemporaryDirectory() as folder:
        trainer = demo_trainer(Path(folder))
        objective = trainer.objective
        denoiser = trainer.players["denoiser"]["denoiser"]  # type: ignore[index]
        for step in range(ROUNDS):
            began = time.perf_counter()
            batch = batch_of(step)
            trainer.move(objective.prepare(batch, Randomness(0, step, batch.slots)))
            whole.append(time.perf_counter() - began)
            t = torch.rand(BATCH)
            began = time.perf_counter()
            x_0, _ = denoiser(batch.images, t, batch.tokens, batch.mask)
            torch.autograd.backward(x_0.square().mean())
            bare.append(time.perf_counter() - began)
            denoiser.zero_grad(set_to_none=True)
    value, peer = statistics.median(whole[5:]), statistics.median(bare[5:])
    return record("training_speed", [0], value, peer, BAR, value / peer <= BAR,
                  {"pictures_per_second": BATCH / value, "batch_size": BATCH})  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(main()))

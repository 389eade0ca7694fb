"""Counter-based randomness: every draw is a pure function of (seed, stream, step, slot).

A slot is a sample's position in the global batch, so results depend neither on the number of workers nor on how often
a run was interrupted, and a checkpoint holds no generator state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

GOLDEN = 0.6180339887498949
BELOW_ONE = 1 - 2**-24
CPU = torch.device("cpu")


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any names and numbers, stable across processes and Python versions."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class Randomness:
    """The random numbers of one training step for the samples at `slots` of the global batch."""

    seed: int
    step: int
    slots: tuple[int, ...]
    device: torch.device = CPU  # where the numbers are handed out; they are drawn on the CPU

    def _generators(self, stream: str) -> list[torch.Generator]:
        seeds = (derive_seed(self.seed, stream, self.step, slot) for slot in self.slots)
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    def normal(self, stream: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Standard normal [len(slots), *shape], one generator a sample."""
        return torch.stack([torch.randn(shape, generator=g) for g in self._generators(stream)]).to(self.device)

    def uniform(self, stream: str, shape: tuple[int, ...] = ()) -> torch.Tensor:
        """Uniform in [0, 1) of [len(slots), *shape], one generator a sample."""
        return torch.stack([torch.rand(shape, generator=g) for g in self._generators(stream)]).to(self.device)

    def stratified(self, stream: str) -> torch.Tensor:
        """Uniform in [0, 1) of [len(slots)], spread evenly over the global batch: one random start, golden-ratio steps.

        Each number is uniform on its own; together they leave no gap (Kuipers & Niederreiter 1974, ch. 2), so a mean
        over a small batch varies less. A slot's number does not depend on the batch size or the workers.
        """
        start = torch.rand((), generator=self.shared(stream), dtype=torch.float64)
        spread = (start + torch.tensor(self.slots, dtype=torch.float64) * GOLDEN) % 1.0
        return spread.float().clamp_max(BELOW_ONE).to(self.device)

    def shared(self, stream: str) -> torch.Generator:
        """One generator for the whole step, the same on every worker."""
        return torch.Generator().manual_seed(derive_seed(self.seed, stream, self.step))


def shuffled(seed: int, stream: str, count: int, places: Sequence[int]) -> torch.Tensor:
    """Rows [len(places)] at these places of an endless list of `count` rows that has a fresh order in each epoch."""
    order = {
        epoch: torch.randperm(count, generator=Randomness(seed, epoch, ()).shared(stream))
        for epoch in {place // count for place in places}
    }
    return torch.stack([order[place // count][place % count] for place in places])

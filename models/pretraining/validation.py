"""Validation loss: held-out pictures, each at eight stratified times with fixed noise (as MLPerf's Flux.1 benchmark does it).

The velocity's error at t = 1/16, 3/16, ..., 15/16, whatever a recipe's density, shift and weight, so that recipes and steps
can be compared: nothing is drawn anew. Asked of the present weights for the log, of their average by early_stop.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from models.engine.objective import Batch
from models.engine.randomness import Randomness
from models.networks.denoiser import Denoiser
from models.pretraining.flow_matching import noised, velocity_error

TIMES = 8


class Validation:
    """Held-out batches and their noise, looked at every so many steps; noise goes by a picture's row."""

    def __init__(self, denoiser: Denoiser, batches: Sequence[Batch], every: int, seed: int) -> None:
        self.denoiser, self.every = denoiser, every
        self.batches = [batch.to(denoiser.device) for batch in batches]
        self.noise = [self._noise_of(batch, seed) for batch in self.batches]

    def _noise_of(self, batch: Batch, seed: int) -> torch.Tensor:
        rng = Randomness(seed, 0, batch.rows, self.denoiser.device)
        return rng.normal("validation", tuple(batch.images.shape[1:]))

    def __call__(self, step: int, last: bool) -> dict[str, float]:
        """`validation` and its eight parts; nothing between the looks."""
        return self.numbers() if last or step % self.every == 0 else {}

    @torch.no_grad()
    def numbers(self, denoiser: Denoiser | None = None) -> dict[str, float]:
        """Mean error over all pictures and times, and over all pictures at each time; of other weights if some are given."""
        denoiser = denoiser or self.denoiser
        times = [(i + 0.5) / TIMES for i in range(TIMES)]
        sums = [0.0] * TIMES
        for batch, eps in zip(self.batches, self.noise, strict=True):
            for i, time in enumerate(times):
                t = eps.new_full((len(eps),), time)
                x_0, _ = denoiser(noised(batch.images, eps, t), t, batch.tokens, batch.mask)
                sums[i] += float(velocity_error(x_0, batch.images, t, denoiser.t_clamp).sum())
        count = sum(len(eps) for eps in self.noise)
        parts = {f"validation t={time:g}": total / count for time, total in zip(times, sums, strict=True)}
        return {"validation": sum(sums) / count / TIMES, **parts}

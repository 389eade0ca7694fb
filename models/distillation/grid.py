"""The student's time grid: t_i = shift(i / N) for i = N .. 1, then 0. Training, sampling and export read this one.

Halving a grid halves the *index* of the shifted grid: every second point of the 2N grid is the N grid exactly, because
shift is applied to i / N (page-wide trap: halving shifted times themselves gives another grid).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from models.pretraining.config import TimestepConfig
from models.pretraining.timesteps import apply_shift, shift_of


@dataclass(frozen=True)
class Schedule:
    """The rule that shifts a grid by the number of patches of a picture; the default does not shift."""

    rule: TimestepConfig = TimestepConfig(shift="none")
    patch_size: int = 4

    def shift(self, images: torch.Tensor) -> float:
        """k for pictures [B, C, H, W]."""
        _, _, h, w = images.shape
        return shift_of(h * w // self.patch_size**2, self.rule)

    def at(self, index: torch.Tensor, steps: int, images: torch.Tensor) -> torch.Tensor:
        """Times [B], of the pictures' type, of grid positions `index` [B] in 0 .. `steps`."""
        return apply_shift(index.double() / steps, self.shift(images)).to(images.dtype)


def check_grid(times: Sequence[float]) -> None:
    """Refuse a grid (without the final 0) that is not 1 = t_N > ... > t_1 > 0."""
    bad = [t for t in times if not (math.isfinite(t) and 0 < t <= 1)]
    if bad:
        raise ValueError(f"time {bad[0]} is outside (0, 1]; times run from 1 (noise) to 0 (data), 0 itself is implied")
    if not times or times[0] != 1.0:
        raise ValueError(f"grid {list(times)} does not start at 1 (pure noise); put 1 first")
    wrong = [(a, b) for a, b in zip(times, times[1:], strict=False) if b >= a]
    if wrong:
        raise ValueError(f"grid {list(times)} does not fall at {wrong[0][0]} -> {wrong[0][1]}; sort it and drop doubles")


def sub_grids(steps: int) -> tuple[int, ...]:
    """Step counts whose even grid lies inside the grid of `steps`: its divisors."""
    return tuple(n for n in range(1, steps + 1) if steps % n == 0)

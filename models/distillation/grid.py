"""The student's time grid: t_i = shift(i / N) for i = N .. 1, then 0. Training, sampling and export read this one.

Halving a grid halves the *index* of the shifted grid: every second point of the 2N grid is the N grid exactly, because
shift is applied to i / N. A grid is always made of a number of steps, so none can be given that does not fall from 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from models.pretraining.config import ShiftConfig
from models.pretraining.densities import shift_of
from models.pretraining.timesteps import apply_shift


@dataclass(frozen=True)
class Schedule:
    """The rule that shifts a grid by the number of patches of a picture; the default does not shift."""

    rule: ShiftConfig = field(default_factory=lambda: ShiftConfig(shift="none"))
    patch_size: int = 4

    def shift(self, images: torch.Tensor) -> float:
        """k for pictures [B, C, H, W]."""
        _, _, h, w = images.shape
        return shift_of(h * w // self.patch_size**2, self.rule)

    def at(self, index: torch.Tensor, steps: int, images: torch.Tensor) -> torch.Tensor:
        """Times [B], of the pictures' type, of grid positions `index` [B] in 0 .. `steps`."""
        return apply_shift(index.double() / steps, self.shift(images)).to(images.dtype)


def sub_grids(steps: int) -> tuple[int, ...]:
    """Step counts whose even grid lies inside the grid of `steps`: its divisors."""
    return tuple(n for n in range(1, steps + 1) if steps % n == 0)

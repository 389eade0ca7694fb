"""The contract between the loop and what looks at a run from outside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from models.engine.loop import Trainer


class Watch(Protocol):
    """Looks at a run from outside before the first step, every so many steps and after the last; may end it."""

    @property
    def every(self) -> int:
        """Steps between looks."""

    @property
    def ended(self) -> bool:
        """True once it has ended the run."""

    def look(self, trainer: Trainer) -> None:
        """Judge the present weights; may replace them when it ends the run."""

    def state(self) -> dict[str, torch.Tensor]:
        """What it remembers, for the checkpoint."""

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Inverse of `state`."""

"""The contract between the loop and what looks at a run from outside, and the best weights that a watch keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import torch

from models.engine.weights import put_weights

if TYPE_CHECKING:
    from models.engine.loop import Trainer

BEST = "best/"  # begins the names of kept weights in a checkpoint


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


class BestWeights:
    """A player's averaged weights at the best look so far, which a watch takes when it ends the run."""

    def __init__(self, player: str) -> None:
        self.player, self.kept = player, dict[str, torch.Tensor]()

    def keep(self, trainer: Trainer) -> None:
        """Keep a copy of the present average."""
        self.kept = {name: value.clone() for name, value in trainer.emas[self.player].average.items()}

    def restore(self, trainer: Trainer) -> None:
        """Make them the player's weights and its average."""
        put_weights(trainer.players[self.player], self.kept)
        for name, value in self.kept.items():
            trainer.emas[self.player].average[name].copy_(value)

    def state(self) -> dict[str, torch.Tensor]:
        """Their part of a watch's state."""
        return {f"{BEST}{name}": value for name, value in self.kept.items()}

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Inverse of `state`, among whatever else a watch remembers."""
        self.kept = {name.removeprefix(BEST): value for name, value in tensors.items() if name.startswith(BEST)}

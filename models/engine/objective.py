"""The contract between a training technique and the one loop."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from models.engine.randomness import Randomness

SUM, COUNT = "\tsum", "\tcount"  # ends of the keys of a ratio's two numbers
SKIPPED = "skipped_steps"  # end of the key of the steps a player did not move in


@dataclass
class Batch:
    """One worker's part of a batch.

    images: float32 [B, 3, H, W] in [-1, 1]; tokens: float32 [B, T, D] standardised text features; mask: bool [B, T],
    True for real tokens; teacher: float32 [B, h, w, E] features of the clean picture or None; weight: float32 [B];
    extra: what an objective adds in `prepare` (noise, times, targets) or the data source adds for it; rows: where the
    samples come from, for messages.
    """

    images: torch.Tensor
    tokens: torch.Tensor
    mask: torch.Tensor
    slots: tuple[int, ...]
    teacher: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    extra: dict[str, torch.Tensor] = field(default_factory=dict)
    rows: tuple[int, ...] = ()

    def to(self, device: torch.device) -> Batch:
        """The same batch with all its tensors there."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """The same batch in page-locked memory, from which a GPU fetches it beside its work."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        return replace(
            self, images=change(self.images), tokens=change(self.tokens), mask=change(self.mask),
            teacher=None if self.teacher is None else change(self.teacher),
            weight=None if self.weight is None else change(self.weight),
            extra={name: change(value) for name, value in self.extra.items()},
        )  # fmt: skip


@dataclass
class Loss:
    """`total` is differentiated; `parts` are detached numbers for the log.

    ratios: sums and counts, each added up over steps and workers before they are divided; a count may be 0.
    """

    total: torch.Tensor
    parts: dict[str, torch.Tensor] = field(default_factory=dict)
    ratios: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def numbers(self, count: int) -> dict[str, float]:
        """What a row of the log is made of, where this is the loss of one of `count` parts of a batch."""
        numbers = {"loss": float(self.total.detach()) / count}
        numbers |= {key: float(value) / count for key, value in self.parts.items()}
        for key, (total, number) in self.ratios.items():
            numbers |= {f"{key}{SUM}": float(total), f"{key}{COUNT}": float(number)}
        return numbers


def mean_row(window: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Means over the steps in which a number was told; of skipped steps, which told no other, how many."""
    return {key: sum(values) if key.endswith(SKIPPED) else sum(values) / len(values) for key, values in window.items()}


def divided(row: dict[str, float]) -> dict[str, float]:
    """A row with its ratios worked out; one whose count is 0 is left out."""
    plain = {key: value for key, value in row.items() if not key.endswith((SUM, COUNT))}
    sums = {key.removesuffix(SUM): value for key, value in row.items() if key.endswith(SUM)}
    return plain | {key: total / row[key + COUNT] for key, total in sums.items() if row[key + COUNT]}


def write_metrics(rows: list[dict[str, float]], path: Path) -> None:
    """The log as one JSON object a line."""
    path.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))


class Objective(Protocol):
    """One training technique: who is trained, in which order, on what loss."""

    @property
    def players(self) -> Mapping[str, nn.Module]:
        """What is trained, by name; each player gets its own optimizer."""

    def turns(self, step: int) -> Sequence[str]:
        """The players that move in this step, in order."""

    def prepare(self, batch: Batch, rng: Randomness) -> Batch:
        """Everything without gradient: noise, times, rollouts, teacher targets."""

    def loss(self, player: str, batch: Batch) -> Loss:
        """The loss of one player's move, averaged over this worker's samples."""

    def after_step(self, step: int) -> None:
        """Bookkeeping once all players have moved (target networks)."""

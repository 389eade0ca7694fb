"""Early stop at the best: a Watch that ends flow matching once the validation loss of the averaged weights falls no more.

Continued training and SFT see little data many times, so the loss on held-out pictures turns before their steps are done, and
the training loss does not show it. Every look asks the weights that will be saved, the averaged ones, at the fixed times and
noise of validation.py; after `patience` looks without a new best, or after the last step, the best ones are taken, the start
included. Looks follow from the weights alone, so a resumed run has the same ones.
"""

from __future__ import annotations

import math
from dataclasses import asdict, astuple, dataclass
from typing import Any

import torch

from models.engine.loop import Trainer, TrainingDivergedError
from models.engine.watch import BestWeights
from models.engine.weights import with_weights
from models.pretraining.validation import Validation

PLAYER, PREFIX = "denoiser", "denoiser."


@dataclass(frozen=True)
class Look:
    """Loss of one set of averaged weights."""

    step: int
    loss: float


class EarlyStop:
    """A Watch of the loop for FlowMatching's player."""

    def __init__(self, validation: Validation, patience: int) -> None:
        self.validation, self.patience = validation, patience
        self.looks: list[Look] = []
        self.best = BestWeights(PLAYER)
        self.best_at, self.ended = 0, False

    @property
    def every(self) -> int:
        """Steps between looks."""
        return self.validation.every

    @torch.no_grad()
    def look(self, trainer: Trainer) -> None:
        """Measure the averaged weights; keep them if they are the best, end the run with the best if there is no hope."""
        average = trainer.emas[PLAYER].average
        own = {name.removeprefix(PREFIX): value for name, value in average.items() if name.startswith(PREFIX)}
        net = with_weights(self.validation.denoiser, own).eval()
        found = Look(trainer.step, self.validation.numbers(net)["validation"])
        self.looks.append(found)
        if not self.best.kept and not math.isfinite(found.loss):
            raise TrainingDivergedError(
                f"validation loss of the weights that training starts from is {found.loss} (step {found.step}), so no best "
                "can be kept; look at the start checkpoint and at the held-out pictures, or set validation.patience to null"
            )
        if not self.best.kept or found.loss < self.looks[self.best_at].loss:
            self.best.keep(trainer)
            self.best_at = len(self.looks) - 1
        if self.out_of_patience or trainer.step >= trainer.config.steps:
            self.ended = True
            self.best.restore(trainer)

    @property
    def out_of_patience(self) -> bool:
        """Whether the last `patience` looks brought no new best."""
        return len(self.looks) - 1 - self.best_at >= self.patience

    def report(self) -> dict[str, Any]:
        """Looks, the step whose weights were taken, and why there was no further step, for the stage's facts."""
        last, taken = self.looks[-1], self.looks[self.best_at]
        reason = f"step {last.step} was the last"
        if self.out_of_patience:
            reason = f"{self.patience} looks up to step {last.step} brought no loss below {taken.loss:.6g}"
        return {"looks": [asdict(look) for look in self.looks], "taken": taken.step, "loss": taken.loss,
                "early": self.out_of_patience, "reason": reason}  # fmt: skip

    def state(self) -> dict[str, torch.Tensor]:
        """Looks, best weights and counters as tensors."""
        table = torch.tensor([astuple(look) for look in self.looks], dtype=torch.float64)
        counters = torch.tensor([self.best_at, int(self.ended)])
        return {"looks": table, "counters": counters} | self.best.state()

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Inverse of `state`."""
        self.looks = [Look(int(row[0]), row[1]) for row in tensors["looks"].tolist()]
        self.best_at, ended = tensors["counters"].tolist()
        self.ended = bool(ended)
        self.best.load_state(tensors)

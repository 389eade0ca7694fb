"""The one training loop. It knows objectives, not techniques; neither Ray nor Prefect.

Each step: fetch this worker's part of the batch, let the objective prepare it, then let each player take its turn
(forward, backward, average gradients over workers, clip, move), then update the averages. A run killed anywhere and
started again continues from its last checkpoint with the same numbers to the bit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from models.engine.config import TrainConfig
from models.engine.distribute import average_gradients, average_scalars, barrier, broadcast_parameters, world
from models.engine.ema import PowerEma
from models.engine.objective import Batch, Objective
from models.engine.optim import PlayerOptimizer
from models.engine.randomness import Randomness
from models.engine.state import load_state, save_state
from models.engine.weights import put_weights

MAX_SKIPPED = 20

Progress = Callable[[int, int, dict[str, float]], None]


class TrainingDivergedError(RuntimeError):
    """Too many steps in a row had a non-finite gradient."""


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


class Trainer:
    """Weights, optimizers, averages and position of one run."""

    def __init__(self, objective: Objective, config: TrainConfig, folder: Path, watch: Watch | None = None) -> None:
        self.objective, self.config, self.folder, self.watch = objective, config, folder, watch
        self.players = dict(objective.players)
        self.trainable = {name: [p for p in m.parameters() if p.requires_grad] for name, m in self.players.items()}
        for module in self.players.values():
            broadcast_parameters(module)
        own = getattr(objective, "optimizers", {})  # a player may have settings of its own
        span = getattr(objective, "schedule_steps", config.steps)  # the rate falls once in every span
        self.optimizers = {n: PlayerOptimizer(m, own.get(n, config.optimizer), span) for n, m in self.players.items()}
        self.emas = {n: PowerEma(m, config.ema_gamma) for n, m in self.players.items()}
        self.step = 0
        self.skipped = 0
        self.rows: list[dict[str, float]] = []

    def save(self) -> None:
        """Write a checkpoint (rank 0), all workers waiting for it."""
        if world()[0] == 0:
            groups: dict[str, dict[str, torch.Tensor]] = {}
            for name, module in self.players.items():
                groups[f"{name}.weights"] = trainable_tensors(module, self.trainable[name])
                groups[f"{name}.optimizer"] = self.optimizers[name].tensors()
                groups[f"{name}.ema"] = self.emas[name].average
            extra = getattr(self.objective, "state", None)
            if extra is not None:
                groups["objective"] = extra()
            if self.watch is not None:
                groups["watch"] = self.watch.state()
            updates = {name: ema.updates for name, ema in self.emas.items()}
            meta = {"updates": updates, "rows": self.rows, "skipped": self.skipped}
            save_state(self.folder, self.step, groups, meta)
        barrier()

    def resume(self) -> bool:
        """Continue from the newest checkpoint if there is one."""
        found = load_state(self.folder)
        if found is None:
            return False
        self.step, groups, meta = found
        for name, module in self.players.items():
            put_weights(module, groups[f"{name}.weights"])
            self.optimizers[name].load_tensors(groups[f"{name}.optimizer"])
            self.emas[name].average = groups[f"{name}.ema"]
            self.emas[name].updates = meta["updates"][name]
        if "objective" in groups:
            self.objective.load_state(groups["objective"])  # type: ignore[attr-defined]
        if self.watch is not None:
            self.watch.load_state(groups["watch"])
        self.rows, self.skipped = meta["rows"], meta["skipped"]
        return True

    @property
    def done(self) -> bool:
        """True after the last step, or when the watch has ended the run."""
        return self.step >= self.config.steps or (self.watch is not None and self.watch.ended)

    def move(self, batch: Batch) -> dict[str, float]:
        """One step: every player's turn on one prepared batch; returns the numbers for the log."""
        numbers: dict[str, float] = {}
        for name in self.objective.turns(self.step):
            self._give_turn(name)
            loss = self.objective.loss(name, batch)
            torch.autograd.backward(loss.total)
            average_gradients(self.trainable[name])
            norm, moved = self.optimizers[name].step(self.step)
            self.skipped = 0 if moved else self.skipped + 1
            if self.skipped >= MAX_SKIPPED:
                raise TrainingDivergedError(
                    f"gradient of {name} was not finite in {MAX_SKIPPED} steps running up to step {self.step}; "
                    "lower the learning rate or clip_norm, or look for broken rows in the data"
                )
            prefix = "" if len(self.players) == 1 else f"{name}/"
            numbers |= {f"{prefix}loss": float(loss.total.detach()), f"{prefix}gradient_norm": norm}
            numbers |= {f"{prefix}{key}": float(value) for key, value in loss.parts.items()}
            self.emas[name].update(self.players[name])
        self._give_turn(None)
        self.objective.after_step(self.step)
        return numbers

    def _give_turn(self, turn: str | None) -> None:
        for name, parameters in self.trainable.items():
            for parameter in parameters:
                parameter.requires_grad_(turn is None or name == turn)


def trainable_tensors(module: nn.Module, trainable: list[nn.Parameter]) -> dict[str, torch.Tensor]:
    """The trainable parameters of a module by name."""
    wanted = {id(p) for p in trainable}
    return {name: p.detach() for name, p in module.named_parameters() if id(p) in wanted}


def train(
    objective: Objective,
    batches: Callable[[int], Batch],
    config: TrainConfig,
    scratch: Path,
    progress: Progress | None = None,
    on_sample: Callable[[int, Trainer], None] | None = None,
    watch: Watch | None = None,
) -> Trainer:
    """Train to `config.steps`, resuming from `scratch`; returns the trainer with final weights, averages and log rows.

    `batches(step)` is this worker's part of the batch of that step, a pure function of the step.
    """
    trainer = Trainer(objective, config, scratch / "checkpoints", watch)
    if not trainer.resume() and watch is not None:
        watch.look(trainer)
    started, window = time.perf_counter(), dict[str, list[float]]()
    while not trainer.done:
        step = trainer.step
        batch = batches(step)
        prepared = objective.prepare(batch, Randomness(config.seed, step, batch.slots))
        for key, value in trainer.move(prepared).items():
            window.setdefault(key, []).append(value)
        trainer.step = step + 1
        last = trainer.step == config.steps
        if trainer.step % config.log_every == 0 or last:
            row = average_scalars({key: sum(values) / len(values) for key, values in window.items()})
            window.clear()
            trainer.rows.append({"step": trainer.step, **row})
            if progress is not None and world()[0] == 0:
                progress(trainer.step, config.steps, {**row, "seconds": time.perf_counter() - started})
        if watch is not None and (trainer.step % watch.every == 0 or last):
            watch.look(trainer)
        if trainer.step % config.checkpoint_every == 0 and not last:
            trainer.save()
        if on_sample is not None and config.sample_every and trainer.step % config.sample_every == 0:
            on_sample(trainer.step, trainer)
    trainer.save()
    return trainer


def write_metrics(rows: list[dict[str, float]], path: Path) -> None:
    """The log as one JSON object a line."""
    path.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))

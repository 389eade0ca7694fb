"""The one training loop. It knows objectives, not techniques; neither Ray nor Prefect.

Each step: fetch this worker's part of the batch, let the objective prepare it, then let each player take its turn
(forward, backward, average gradients over workers, clip, move), then update the averages. A run killed anywhere and
started again continues from its last checkpoint with the same numbers to the bit.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from infra.config import versioned
from models.device import compute_device
from models.engine.batches import loaded, parts_of
from models.engine.config import TrainConfig
from models.engine.distribute import average_gradients, average_scalars, barrier, broadcast_parameters, world
from models.engine.ema import SNAPSHOT_GAMMAS, PowerEma
from models.engine.meter import Meter
from models.engine.objective import SKIPPED, Batch, Objective, divided, mean_row
from models.engine.optim import PlayerOptimizer
from models.engine.precision import autocast
from models.engine.randomness import Randomness
from models.engine.shard import gathered, hollow, is_cut, prepare_blocks, shard_blocks
from models.engine.state import load_state, refuse_changes, refuse_other_model, save_state
from models.engine.watch import Watch
from models.engine.weights import put_weights, trainable_tensors

MAX_SKIPPED = 20

log = logging.getLogger(__name__)

Progress = Callable[[int, int, dict[str, float]], None]


class TrainingDivergedError(RuntimeError):
    """Too many steps in a row had a non-finite gradient."""


class Trainer:
    """Weights, optimizers, averages and position of one run."""

    def __init__(self, objective: Objective, config: TrainConfig, folder: Path, watch: Watch | None = None) -> None:
        self.objective, self.config, self.folder, self.watch = objective, config, folder, watch
        self.players = dict(objective.players)
        self.uncut: dict[str, nn.Module] = {}  # copies of cut players, without weights
        self.averages: dict[str, dict[str, torch.Tensor]] = {}  # of cut players, whole, as last gathered (rank 0)
        for name, module in self.players.items():
            broadcast_parameters(module.to(compute_device()))
            self._prepare(name, module)
        self.trainable = {name: [p for p in m.parameters() if p.requires_grad] for name, m in self.players.items()}
        own = getattr(objective, "optimizers", {})  # a player may have settings of its own
        span = getattr(objective, "schedule_steps", config.steps)  # the rate falls once in every span
        self.optimizers = {n: PlayerOptimizer(m, own.get(n, config.optimizer), span) for n, m in self.players.items()}
        self.emas = {n: PowerEma(m, config.ema_gamma, config.ema_decay) for n, m in self.players.items()}
        gammas = SNAPSHOT_GAMMAS if config.ema_snapshot_every else ()
        self.tracked = {
            f"{n}.power{i}": (n, PowerEma(m, g)) for n, m in self.players.items() for i, g in enumerate(gammas)
        }
        self.step = 0
        self.skipped = 0
        self.rows: list[dict[str, float]] = []
        self.meter = Meter(torch.bfloat16 if config.precision == "bf16" else torch.float32)

    def _prepare(self, name: str, module: nn.Module) -> None:
        """Compile, recompute and cut the blocks of a player, as the settings say."""
        cutting = self.config.shard and world()[1] > 1
        if cutting and (not getattr(self.objective, "shardable", False) or self.watch is not None):
            raise ValueError(
                f"shard=true cannot train {type(self.objective).__name__}, which copies its networks on the way; "
                "it is for flow matching with all weights trained, set it to false"
            )
        if cutting:
            self.uncut[name] = hollow(module)
        prepare_blocks(module, self.config)
        if cutting:
            shard_blocks(module, self.config.precision == "bf16")

    def gather(self) -> None:
        """Put the parts of the averages together, for whoever asks `average`; all workers must."""
        self.averages = {name: gathered(self.emas[name].average, self.players[name]) for name in self.uncut}

    def average(self, name: str) -> dict[str, torch.Tensor]:
        """A player's averaged weights; those of a cut one as they were last gathered, on rank 0."""
        return self.averages[name] if name in self.uncut else self.emas[name].average

    def save(self) -> None:
        """Write a checkpoint (rank 0), all workers waiting for it."""
        self.gather()
        if world()[0] == 0 or self.uncut:
            groups: dict[str, dict[str, torch.Tensor]] = {}
            for name, module in self.players.items():
                weights = trainable_tensors(module, self.trainable[name])
                groups[f"{name}.weights"] = gathered(weights, module) if name in self.uncut else weights
                groups[f"{name}.optimizer"] = self.optimizers[name].tensors()
                groups[f"{name}.ema"] = self.average(name)
            groups |= self.snapshots()
        if world()[0] == 0:
            extra = getattr(self.objective, "state", None)
            if extra is not None:
                groups["objective"] = extra()
            if self.watch is not None:
                groups["watch"] = self.watch.state()
            updates = {name: ema.updates for name, ema in self.emas.items()}
            settings = versioned(self.config)
            meta = {"updates": updates, "rows": self.rows, "skipped": self.skipped, "settings": settings}
            save_state(self.folder, self.step, groups, meta)
        barrier()

    def snapshots(self) -> dict[str, dict[str, torch.Tensor]]:
        """The two power averages of every player, whole on rank 0; all workers must ask where weights are cut."""
        return {
            name: gathered(ema.average, self.players[player]) if player in self.uncut else ema.average
            for name, (player, ema) in self.tracked.items()
        }

    def resume(self) -> bool:
        """Continue from the newest checkpoint if there is one."""
        found = load_state(self.folder)
        if found is None:
            return False
        self.step, groups, meta = found
        refuse_changes(meta.get("settings"), versioned(self.config), self.folder)
        for name, module in self.players.items():
            refuse_other_model(groups[f"{name}.weights"], trainable_tensors(module, self.trainable[name]), self.folder)
            put_weights(module, groups[f"{name}.weights"])
            self.optimizers[name].load_tensors(groups[f"{name}.optimizer"])
            self.emas[name].load(groups[f"{name}.ema"])
            self.emas[name].updates = meta["updates"][name]
        for name, (player, ema) in self.tracked.items():
            ema.load(groups[name])
            ema.updates = meta["updates"][player]
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
            prefix = "" if len(self.players) == 1 else f"{name}/"
            sums: dict[str, float] = {}
            for part in parts_of(batch, self.config.accumulate):
                for key, value in self._backward(name, part).items():
                    sums[key] = sums.get(key, 0.0) + value
            average_gradients([p for p in self.trainable[name] if not is_cut(p)])
            norm, moved = self.optimizers[name].step(self.step)
            self._count_skipped(name, moved, batch)
            told = {**sums, "gradient_norm": norm} if moved else {SKIPPED: 1.0}
            numbers |= {f"{prefix}{key}": value for key, value in told.items()}
            self.emas[name].update()
            for player, ema in self.tracked.values():
                if player == name:
                    ema.update()
        self._give_turn(None)
        self.objective.after_step(self.step)
        return numbers

    def _backward(self, name: str, part: Batch) -> dict[str, float]:
        """Add one part's gradient; its share of the numbers for the log."""
        count = self.config.accumulate
        with autocast(part.images.device, self.config.precision, bool(self.uncut)):
            loss = self.objective.loss(name, part)
        torch.autograd.backward(loss.total if count == 1 else loss.total / count)
        return loss.numbers(count)

    def _count_skipped(self, name: str, moved: bool, batch: Batch) -> None:
        """Name the rows behind a gradient that is not finite; end the run where the settings say so."""
        self.skipped = 0 if moved else self.skipped + 1
        if moved:
            return
        where = f"gradient of {name} is not finite in step {self.step}, rows {list(batch.rows) or 'unknown'}"
        if self.config.non_finite == "stop":
            raise TrainingDivergedError(f"{where}; lower the learning rate, or look at these rows of the data")
        log.warning("%s: the step is left out", where)
        if self.skipped >= MAX_SKIPPED:
            raise TrainingDivergedError(
                f"gradient of {name} was not finite in {MAX_SKIPPED} steps running up to step {self.step}; "
                "lower the learning rate or clip_norm, or look for broken rows in the data"
            )

    def _give_turn(self, turn: str | None) -> None:
        for name, parameters in self.trainable.items():
            for parameter in parameters:
                parameter.requires_grad_(turn is None or name == turn)


def train(
    objective: Objective,
    batches: Callable[[int], Batch],
    config: TrainConfig,
    scratch: Path,
    progress: Progress | None = None,
    on_sample: Callable[[int, Trainer], None] | None = None,
    watch: Watch | None = None,
    measure: Callable[[int, bool], dict[str, float]] | None = None,
) -> Trainer:
    """Train to `config.steps`, resuming from `scratch`; returns the trainer with final weights, averages and log rows.

    `batches(step)` is this worker's part of the batch of that step, a pure function of the step; `measure(step, last)`
    adds numbers to a row of the log, the same on every worker.
    """
    trainer = Trainer(objective, config, scratch / "checkpoints", watch)
    if not trainer.resume() and watch is not None:
        watch.look(trainer)
    started, window, meter, device = time.perf_counter(), dict[str, list[float]](), trainer.meter, compute_device()
    with loaded(batches, config.loader_threads, config.steps) as fetch:
        while not trainer.done:
            step = trainer.step
            with meter.spent("data"):
                batch = fetch(step).to(device)
            with meter.spent("step"):
                prepared = objective.prepare(batch, Randomness(config.seed, step, batch.slots, device))
                for key, value in trainer.move(prepared).items():
                    window.setdefault(key, []).append(value)
            meter.counted(batch, partial(losses_again, trainer, prepared))
            trainer.step = step + 1
            last = trainer.step == config.steps
            if trainer.step % config.log_every == 0 or last:
                row = divided(average_scalars(mean_row(window)))
                window.clear()
                if measure is not None:
                    with meter.spent("look"):
                        row |= measure(trainer.step, last)
                trainer.rows.append({"step": trainer.step, **row})
                if progress is not None and world()[0] == 0:
                    seconds = time.perf_counter() - started
                    progress(trainer.step, config.steps, {**row, **meter.numbers(), "seconds": seconds})
            _look_and_keep(trainer, last, scratch, on_sample)
    trainer.save()
    return trainer


def losses_again(trainer: Trainer, batch: Batch) -> None:
    """The forward pass of a step once more, where it has no side effects (`pure_loss`) and needs no other worker."""
    objective = trainer.objective
    if getattr(objective, "pure_loss", False) and not trainer.uncut:
        with autocast(batch.images.device, trainer.config.precision):
            for name in objective.players:
                objective.loss(name, batch)


def _look_and_keep(
    trainer: Trainer, last: bool, scratch: Path, on_sample: Callable[[int, Trainer], None] | None
) -> None:
    """What happens between two steps: the watch, a grid, a snapshot, a checkpoint."""
    config, watch, step = trainer.config, trainer.watch, trainer.step
    with trainer.meter.spent("look"):
        if watch is not None and (step % watch.every == 0 or last):
            watch.look(trainer)
    if on_sample is not None and config.sample_every and step % config.sample_every == 0:
        with trainer.meter.spent("look"):
            trainer.gather()
            on_sample(step, trainer)
    with trainer.meter.spent("checkpoint"):
        if config.ema_snapshot_every and step % config.ema_snapshot_every == 0:
            averages = trainer.snapshots()
            if world()[0] == 0:
                save_state(scratch / "snapshots" / str(step), step, averages, {"gammas": SNAPSHOT_GAMMAS})
        if step % config.checkpoint_every == 0 and not last:  # after all else: who goes on from it lacks nothing
            trainer.save()

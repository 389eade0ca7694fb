"""`train()` a step at a time, so that its steps can be taken in turn with those of other loops."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Semaphore

import torch

from models.device import compute_device
from models.engine.config import TrainConfig
from models.engine.distribute import one_thread
from models.engine.loop import Trainer, train
from models.engine.meter import settle
from models.engine.objective import Batch, Objective


class Turns:
    """A watch that lets `train()` make one step at a time; it is asked in `train()`'s own thread after every step."""

    every = 1

    def __init__(
        self, objective: Objective, batches: Callable[[int], Batch], config: TrainConfig, folder: Path
    ) -> None:
        self.ended = False
        self.seconds, self.waits = list[float](), list[float]()
        self._began = self._waited = 0.0
        self._go, self._stands = Semaphore(0), Semaphore(0)
        self._pool = ThreadPoolExecutor(1)
        self._run: Future[Trainer] = self._pool.submit(self._train, objective, batches, config, folder)
        self._until_it_stands()

    def _train(
        self, objective: Objective, batches: Callable[[int], Batch], config: TrainConfig, folder: Path
    ) -> Trainer:
        with one_thread():  # a new thread does not know how many threads torch may use
            return train(objective, batches, config, folder, _say_nothing, watch=self)

    def look(self, trainer: Trainer) -> None:
        """Note what the step took, and stand still until the next one is asked for; first before the first step."""
        settle(compute_device())
        if trainer.step > 0:
            self.seconds.append(time.perf_counter() - self._began)
            self.waits.append(trainer.meter.seconds["data"] - self._waited)
        self._waited = trainer.meter.seconds["data"]
        self._stands.release()
        self._go.acquire()
        self._began = time.perf_counter()

    def step(self) -> None:
        """One step of `train()`: from its watch to its watch."""
        self._go.release()
        self._until_it_stands()

    def end(self) -> Trainer:
        """Let it finish."""
        self.ended = True
        self._go.release()
        with self._pool:
            return self._run.result()

    def _until_it_stands(self) -> None:
        while not self._stands.acquire(timeout=1.0):
            if self._run.done():
                self._run.result()
                raise RuntimeError("train() ended before it was told to")

    def state(self) -> dict[str, torch.Tensor]:
        """Nothing."""
        return {}

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Nothing."""


def _say_nothing(done: int, total: int, numbers: dict[str, float]) -> None:
    """Progress nobody reads; `train()` works its numbers out all the same."""

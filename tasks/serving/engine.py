"""One thread draws; requests wait in a queue and are drawn in batches of equal shape.

A picture has the same bits whatever it is drawn with: calls have sizes that lanes.py has proven (free places repeat the
last picture) and a length of text that follows from the picture's own prompt. A request whose client has
gone is taken out of the queue; a swap of models lets what is queued finish on the old ones.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from infra.errors import LifecycleError
from models.sampling.generate import Generator, to_uint8
from tasks.serving.config import ServeConfig
from tasks.serving.lanes import Lanes
from tasks.serving.models import Loras, Models, Served

TOKENS = 16  # lengths of text are rounded up to a multiple of this


class Busy(LifecycleError):
    """The queue is full; try again later."""


class Ending(LifecycleError):
    """The server ends and takes nothing new."""


@dataclass(frozen=True)
class Look:
    """What pictures drawn by one call have in common."""

    model: Served
    loras: Loras
    width: int
    height: int
    steps: int
    guidance: float
    sampler: str
    num_tokens: int


@dataclass
class Job:
    """One picture asked for."""

    look: Look
    models: Models
    prompt: str
    seed: int
    done: Future[np.ndarray] = field(default_factory=Future)  # uint8 [H, W, 3]
    since: float = field(default_factory=time.monotonic)


class Engine:
    """The queue and the thread that draws."""

    def __init__(self, models: Models, config: ServeConfig) -> None:
        self.models, self.config = models, config
        self.num_drawn, self.num_calls, self.busy_seconds = 0, 0, 0.0
        self._queue: deque[Job] = deque()
        self._wake = threading.Condition()
        self._ending = False
        self._lanes = Lanes(config.batch)
        self._thread = threading.Thread(target=self._work, name="draw", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Pictures in the queue."""
        return len(self._queue)

    @property
    def ending(self) -> bool:
        """Whether the server takes nothing new."""
        return self._ending

    def submit(self, models: Models, look: Look, prompt: str, seeds: Sequence[int]) -> list[Job]:
        """Queue one picture per seed, all or none."""
        with self._wake:
            if self._ending:
                raise Ending("the server is ending; ask again in a moment")
            if len(self._queue) + len(seeds) > self.config.queue:
                raise Busy(
                    f"{len(self._queue)} pictures wait and the queue takes {self.config.queue}; ask again in a moment"
                )
            jobs = [Job(look, models, prompt, seed) for seed in seeds]
            self._queue.extend(jobs)
            self._wake.notify()
        return jobs

    def swap(self, models: Models) -> None:
        """Serve other models from now on; what is queued keeps those it was asked of."""
        self.models = models

    def end(self) -> None:
        """Take nothing new, finish what is queued as long as the settings allow, then stop."""
        with self._wake:
            self._ending = True
            self._wake.notify_all()
        self._thread.join(self.config.drain_seconds)
        with self._wake:
            for job in self._queue:
                job.done.cancel()
            self._queue.clear()

    def _take(self) -> list[Job]:
        """The oldest picture and others that can be drawn with it; none when the server has ended."""
        with self._wake:
            while not self._queue and not self._ending:
                self._wake.wait()
            first = next((job for job in self._queue if not job.done.cancelled()), None)
            chosen: list[Job] = []
            rest: deque[Job] = deque()
            for job in self._queue:
                if first is None or job.done.cancelled():
                    continue
                if len(chosen) < self.config.batch and job.models is first.models and job.look == first.look:
                    chosen.append(job)
                else:
                    rest.append(job)
            self._queue = rest
            return [job for job in chosen if job.done.set_running_or_notify_cancel()]

    def _work(self) -> None:
        import torch

        torch.set_num_threads(self.config.threads)
        while True:
            jobs = self._take()
            if not jobs:
                if self._ending and not self._queue:
                    return
                continue
            began = time.monotonic()
            try:
                pictures = draw(jobs, self._lanes)
            except Exception as error:  # one bad request must not end the server
                for job in jobs:
                    job.done.set_exception(error)
                continue
            self.num_calls, self.num_drawn = self.num_calls + 1, self.num_drawn + len(jobs)
            self.busy_seconds += time.monotonic() - began
            for job, picture in zip(jobs, pictures, strict=True):
                job.done.set_result(picture)


def draw(jobs: Sequence[Job], lanes: Lanes) -> np.ndarray:
    """uint8 [N, H, W, 3] of jobs with one look."""
    import torch

    first = jobs[0]
    look, generator = first.look, first.models.generator(first.look.model, first.look.loras)
    lane = lanes.fitting(generator, look, len(jobs))
    filled = [*jobs, *[jobs[-1]] * (-len(jobs) % lane)]
    for prompt in {job.prompt for job in jobs}:
        generator.features([prompt])  # alone, because a batch's padding may change the last bit
    drawn = generator.draw(
        [job.prompt for job in filled], [job.seed for job in filled], look.width, look.height, look.steps,
        look.guidance, lane, look.num_tokens, look.sampler,
    )  # fmt: skip
    return to_uint8(torch.from_numpy(drawn[: len(jobs)]))


def text_length(generator: Generator, prompt: str) -> int:
    """Tokens that the prompt's features are cut or padded to."""
    null, own = (generator.features([text])[1] for text in ("", prompt))
    longest = max(int(null.sum()), int(own.sum()))
    return min(-(-longest // TOKENS) * TOKENS, own.shape[1])

"""Fan a function out over items as Ray tasks; results come back in the order of the items."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from infra.stages import DEVICE_VARIABLE

T = TypeVar("T")
R = TypeVar("R")

CHUNKS_PER_CPU = 4


def _apply(function: Callable[[T], R], chunk: Sequence[T], device: str) -> list[R]:
    os.environ[DEVICE_VARIABLE] = device
    return [function(item) for item in chunk]


def ray_fan_out(function: Callable[[T], R], items: Sequence[T], /, num_cpus: int = 1) -> list[R]:
    """Apply `function` on the connected Ray, `num_cpus` items at once; a failing item raises here what it raised there."""
    import ray
    from ray.exceptions import RayTaskError

    size = max(1, math.ceil(len(items) / (CHUNKS_PER_CPU * num_cpus)))
    chunks = [items[start : start + size] for start in range(0, len(items), size)]
    remote, device = ray.remote(num_cpus=1)(_apply), os.environ.get(DEVICE_VARIABLE, "auto")
    running: dict[Any, int] = {}
    results: dict[int, list[R]] = {}
    try:
        for number, chunk in enumerate(chunks):
            if len(running) >= num_cpus:
                _collect(ray, running, results)
            running[remote.remote(function, chunk, device)] = number
        while running:
            _collect(ray, running, results)
    except BaseException as error:
        for task in ray.wait(list(running), num_returns=len(running), timeout=0)[1] if running else []:
            ray.cancel(task)  # never a finished one: Ray 2.60 may abort the process
        if isinstance(error, RayTaskError):
            raise error.as_instanceof_cause() from None
        raise
    return [result for number in range(len(chunks)) for result in results[number]]


def _collect(ray: Any, running: dict[Any, int], results: dict[int, list[R]]) -> None:
    """Take the result of the first task that is done."""
    done = ray.wait(list(running), num_returns=1)[0][0]
    results[running.pop(done)] = ray.get(done)

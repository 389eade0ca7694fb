"""Fan a function out over items as Ray tasks; results come back in the order of the items."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

CHUNKS_PER_CPU = 4


def _apply(function: Callable[[T], R], chunk: Sequence[T]) -> list[R]:
    return [function(item) for item in chunk]


def ray_fan_out(function: Callable[[T], R], items: Sequence[T], /, num_cpus: int = 1) -> list[R]:
    """Apply `function` to every item on the connected Ray; a failing item raises here what it raised there."""
    import ray
    from ray.exceptions import RayTaskError

    if not items:
        return []
    size = max(1, math.ceil(len(items) / (CHUNKS_PER_CPU * num_cpus)))
    remote = ray.remote(num_cpus=1)(_apply)
    pending = [remote.remote(function, items[start : start + size]) for start in range(0, len(items), size)]
    try:
        return [result for chunk in pending for result in ray.get(chunk)]
    except BaseException as error:
        _, running = ray.wait(pending, num_returns=len(pending), timeout=0)
        for chunk in running:  # never a finished one: Ray 2.60 may abort the process
            ray.cancel(chunk)
        if isinstance(error, RayTaskError):
            raise error.as_instanceof_cause() from None
        raise

"""Batches on their way into a step: made ahead by threads, and cut into parts for gradient accumulation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import torch

from models.device import compute_device
from models.engine.objective import Batch

AHEAD = 2  # batches per thread


@contextmanager
def loaded(batches: Callable[[int], Batch], threads: int, last: int) -> Iterator[Callable[[int], Batch]]:
    """`batches`, with those of the next steps (below `last`) made by threads meanwhile.

    A batch is a pure function of its step, so threads change neither order nor content, and no position needs saving.
    """
    if threads == 0:
        yield batches
        return
    pending: dict[int, Future[Batch]] = {}
    pool = ThreadPoolExecutor(threads, thread_name_prefix="loader")
    pin = compute_device().type == "cuda"

    def made(place: int) -> Batch:
        return batches(place).pinned() if pin else batches(place)

    def fetch(step: int) -> Batch:
        for place in range(step, min(last, step + 1 + AHEAD * threads)):
            if place not in pending:
                pending[place] = pool.submit(made, place)
        return pending.pop(step).result()

    try:
        yield fetch
    finally:
        pool.shutdown(cancel_futures=True)


def parts_of(batch: Batch, count: int) -> list[Batch]:
    """The batch in `count` equal parts, in order."""
    b = len(batch.slots)
    if count == 1:
        return [batch]
    if b % count:
        raise ValueError(f"a worker's batch of {b} cannot be computed in {count} equal parts; change accumulate")
    odd = [name for name, value in batch.extra.items() if len(value) != b]
    if odd:
        raise ValueError(
            f"this objective prepares {odd} for the whole batch, so its steps cannot be cut; accumulate: 1"
        )
    return [_rows(batch, slice(start, start + b // count)) for start in range(0, b, b // count)]


def _rows(batch: Batch, rows: slice) -> Batch:
    def cut(value: torch.Tensor | None) -> torch.Tensor | None:
        return None if value is None else value[rows]

    return replace(
        batch, images=batch.images[rows], tokens=batch.tokens[rows], mask=batch.mask[rows], slots=batch.slots[rows],
        teacher=cut(batch.teacher), weight=cut(batch.weight), rows=batch.rows[rows],
        extra={name: value[rows] for name, value in batch.extra.items()},
    )  # fmt: skip

"""Several workers on one batch: ranks, gradient averaging, barriers. Works without torch.distributed too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from models.device import compute_device


def world() -> tuple[int, int]:
    """(rank, number of workers); (0, 1) when torch.distributed is not initialised."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@contextmanager
def one_thread() -> Iterator[None]:
    """What is computed in this block does not depend on the machine's cores, and leaves them to other processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Mean gradient over all workers, as one flat all-reduce; one that only some workers have counts as zero elsewhere.

    What no worker has stays without gradient, so that a term that has ended does not decay or move its weights.
    """
    _, workers = world()
    if workers == 1 or not parameters:
        return
    present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=parameters[0].device)
    grads = [(p.grad if p.grad is not None else torch.zeros_like(p)).reshape(-1) for p in parameters]
    flat = torch.cat([*grads, present])
    dist.all_reduce(flat)
    found = flat[-len(parameters) :].tolist()
    flat /= workers
    offset = 0
    for parameter, somewhere in zip(parameters, found, strict=True):
        count = parameter.numel()
        parameter.grad = flat[offset : offset + count].view_as(parameter) if somewhere else None
        offset += count


def average_scalars(values: dict[str, float]) -> dict[str, float]:
    """Mean of each number over all workers."""
    _, workers = world()
    if workers == 1 or not values:
        return values
    flat = torch.tensor(list(values.values()), dtype=torch.float64, device=compute_device())
    dist.all_reduce(flat)
    return {name: float(v) / workers for name, v in zip(values, flat, strict=True)}


def broadcast_parameters(module: nn.Module) -> None:
    """Give every worker rank 0's weights."""
    if world()[1] == 1:
        return
    for tensor in [*module.parameters(), *module.buffers()]:
        dist.broadcast(tensor.data, src=0)


def sum_over_workers(tensor: torch.Tensor) -> None:
    """Replace a tensor by its sum over all workers."""
    if world()[1] > 1:
        dist.all_reduce(tensor)


def barrier() -> None:
    """Wait for all workers."""
    if world()[1] > 1:
        dist.barrier()

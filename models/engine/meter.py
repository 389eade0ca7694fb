"""Where the time of a run goes: samples per second, share of the measured matmul peak (MFU), waits and stalls.

The arithmetic of a step is three times that of its forward pass, which torch's own counter counts beside the run, once
for each shape of a batch: counting in the run would choose other kernels and change its bits. None of it enters
metrics.jsonl, which must be the same in every run.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.utils.flop_counter import FlopCounterMode

from models.device import compute_device
from models.engine.objective import Batch

PEAK_SIDES = {"cpu": 1024, "cuda": 8192}
PEAK_ROUNDS = 3


class Meter:
    """Seconds by what they were spent on, and the arithmetic done in them, in the matrix type `dtype`."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.seconds: dict[str, float] = defaultdict(float)
        self.samples = self.steps = 0
        self.flops = 0.0
        self._known: dict[tuple[int, ...], float] = {}
        self._peak: float | None = None

    @contextmanager
    def spent(self, on: str) -> Iterator[None]:
        """Add this block's time to data, step, checkpoint or look."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[on] += time.perf_counter() - began

    def counted(self, batch: Batch, forward: Callable[[], object]) -> None:
        """Count one step that was made; `forward` computes its losses again when its shape is new."""
        self.samples, self.steps = self.samples + len(batch.slots), self.steps + 1
        shape = (*batch.images.shape, batch.tokens.shape[1])
        if shape not in self._known:
            eager = torch.compiler.set_stance("force_eager")  # compiled blocks would hide their products
            with eager, torch.no_grad(), FlopCounterMode(display=False) as counter:
                forward()
            self._known[shape] = 3.0 * counter.get_total_flops()
        self.flops += self._known[shape]

    def numbers(self) -> dict[str, float]:
        """Samples per second of this worker, mfu, and shares of the whole time; nothing before the first step."""
        total = sum(self.seconds.values())
        if not self.steps:
            return {}
        if self._peak is None:
            self._peak = matmul_peak(self.dtype)
        return {
            "samples_per_second": self.samples / total,
            **({"mfu": self.flops / self.seconds["step"] / self._peak} if self.flops else {}),
            "data_wait": self.seconds["data"] / total,
            "checkpoint_stall": self.seconds["checkpoint"] / total,
        }


def matmul_peak(dtype: torch.dtype = torch.float32) -> float:
    """Floating-point operations per second of the best of a few products of square matrices, on this process's device."""
    device = compute_device()
    side = PEAK_SIDES.get(device.type, PEAK_SIDES["cpu"])
    numbers = torch.randn(2, side, side, generator=torch.Generator().manual_seed(0))  # zeros would be faster on a GPU
    a, b = numbers.to(device, dtype)
    best = float("inf")
    for _ in range(PEAK_ROUNDS + 1):  # the first one wakes the library up
        began = time.perf_counter()
        _ = a @ b
        settle(device)
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


def settle(device: torch.device) -> None:
    """Wait until the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

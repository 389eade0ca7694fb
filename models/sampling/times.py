"""The times of a sampling grid: our own, or those of a foreign pipeline's scheduler, asked from the scheduler itself.

diffusers 0.42.1 shifts a static-shift scheduler's table when it is made and the grid, which ends at the table's last entry,
once more; asking it keeps that, so our grid is the pipeline's to the bit.
"""

from __future__ import annotations

from typing import Any

from models.pretraining.config import ShiftConfig
from models.pretraining.densities import shift_of
from models.sampling.euler import grid


def times_of(scheduler: dict[str, Any] | None, rule: ShiftConfig, steps: int, tokens: int) -> list[float]:
    """`steps` descending times and 0 for a picture of so many tokens; `scheduler` is the configuration of a stock one."""
    if scheduler is None:
        return grid(steps, shift_of(tokens, rule))
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

    stock = FlowMatchEulerDiscreteScheduler.from_config(scheduler)
    mu = None
    if scheduler.get("use_dynamic_shifting"):
        mu = calculate_shift(
            tokens, scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096),
            scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.16),
        )  # fmt: skip
    stock.set_timesteps(steps, mu=mu)
    return [float(sigma) for sigma in stock.sigmas]

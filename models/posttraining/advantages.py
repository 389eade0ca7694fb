"""Group-relative advantages (GRPO, arXiv:2402.03300, sec. 4.1) over all workers' samples.

A group is the pictures of one prompt; it may lie on several workers. Each reward is normalised on its own before the
weighted sum, since raw scales differ tenfold. The unit is the group's own deviation, or the deviation within groups
pooled over the batch: then a group that is nearly tied teaches little, where its own unit would blow noise up. A group
without spread, or with a reward that is not a number, teaches nothing: its advantages are exactly 0 and it is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist

from models.engine.distribute import world

SMOOTHING = 1e-4
LARGEST = 5.0
Unit = Literal["group", "batch"]


def gathered(values: torch.Tensor, slots: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """All workers' values [R, N] in the order of the slots of the global batch, and where this worker's [B] lie."""
    _, workers = world()
    places = torch.tensor(slots, device=values.device)
    if workers > 1:
        every, theirs = ([torch.empty_like(x) for _ in range(workers)] for x in (values, places))
        dist.all_gather(every, values.contiguous())
        dist.all_gather(theirs, places)
        values, order = torch.cat(every, 1), torch.cat(theirs).argsort()
        return values[:, order], torch.searchsorted(torch.cat(theirs)[order], places)
    order = places.argsort()
    return values[:, order], order.argsort()


def group_advantages(rewards: torch.Tensor, group: int, unit: Unit = "group") -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages of rewards [R, N] in groups of neighbours [R, N], and which groups taught [R, N / group]."""
    kinds, n = rewards.shape
    if group < 2 or n % group:
        raise ValueError(f"{n} samples do not fall into groups of {group}; take groups of 2 or more that divide them")
    grouped = rewards.double().view(kinds, n // group, group)
    deviation = grouped - grouped.mean(2, keepdim=True)
    size = deviation.square().mean(2, keepdim=True)
    if unit == "batch":
        size = size.nanmean(1, keepdim=True)
    scaled = (deviation / (size.sqrt() + SMOOTHING)).clamp(-LARGEST, LARGEST)
    taught = torch.isfinite(grouped).all(2) & (grouped.amax(2) > grouped.amin(2))
    kept = torch.where(taught[..., None], scaled, torch.zeros_like(scaled))
    return kept.view(kinds, n).float(), taught


def weighted_advantages(
    rewards: torch.Tensor, weights: Sequence[float], group: int, slots: Sequence[int], unit: Unit = "group"
) -> tuple[torch.Tensor, torch.Tensor]:
    """This worker's advantages [B] from its rewards [R, B], and the share of all groups that taught nothing."""
    every, mine = gathered(rewards, slots)
    each, taught = group_advantages(every, group, unit)
    total = (each * each.new_tensor(weights)[:, None]).sum(0)
    return total[mine], 1 - taught.any(0).float().mean()

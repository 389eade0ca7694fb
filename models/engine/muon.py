"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): momentum orthogonalised by five Newton-Schulz steps.

torch.optim.Muon has the same update; ours differs in cost alone. It iterates in float32 where the device has no fast
bfloat16 (12-50x on a CPU, docs/log.md), stacks equal shapes into one batched product, and gives every worker a share
of the matrices. Left out: weight decay schedules, convolutions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from models.engine.distribute import world

COEFFICIENTS = (3.4445, -4.775, 2.0315)


def orthogonalise(stack: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Each [R, C] matrix of a stack [N, R, C] with its singular values pushed towards one."""
    a, b, c = COEFFICIENTS
    _, rows, columns = stack.shape
    x = stack.bfloat16() if stack.is_cuda else stack
    if rows > columns:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if rows > columns else x).to(stack.dtype)


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum whose update is orthogonalised and scaled to AdamW's usual RMS (0.2 sqrt(max dim))."""

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                momentum = group["momentum"]
                updates = []
                for parameter in parameters:
                    gradient = parameter.grad
                    assert gradient is not None
                    buffer = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
                    buffer.lerp_(gradient, 1 - momentum)
                    updates.append(gradient.lerp(buffer, momentum))
                directions = _orthogonalise_shared(torch.stack(updates))
                scale = group["lr"] * 0.2 * max(shape) ** 0.5
                for parameter, direction in zip(parameters, directions, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(direction, alpha=-scale)


def _orthogonalise_shared(stack: torch.Tensor) -> torch.Tensor:
    """`orthogonalise`, each worker doing its share of the matrices."""
    rank, workers = world()
    if workers == 1 or len(stack) < workers:
        return orthogonalise(stack)
    share = -(-len(stack) // workers)
    padded = torch.cat([stack, stack.new_zeros(share * workers - len(stack), *stack.shape[1:])])
    mine = orthogonalise(padded[rank * share : (rank + 1) * share]).contiguous()
    parts = [torch.empty_like(mine) for _ in range(workers)]
    dist.all_gather(parts, mine)
    return torch.cat(parts)[: len(stack)]

"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): momentum orthogonalised by five Newton-Schulz steps.

torch.optim.Muon has the same update; ours differs in cost alone. It iterates in float32 where the device has no fast
bfloat16 (12-50x on a CPU, docs/log.md), stacks equal shapes into one batched product, and gives every worker a share
of the matrices. Left out: weight decay schedules, convolutions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from models.engine.distribute import world
from models.engine.shard import cut, whole

COEFFICIENTS = (3.4445, -4.775, 2.0315)


def orthogonalise(stack: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Each [R, C] matrix of a stack [N, R, C] with its singular values pushed towards one.

    A step is X <- Z X with Z = a I + b G + c G^2 and G = X X^T, and then G <- Z G Z. So the whole iteration can run on
    the small square G, and X is touched twice; that is cheaper as soon as X is about twice as wide as high.
    """
    _, rows, columns = stack.shape
    x = stack.bfloat16() if stack.is_cuda else stack
    if rows > columns:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    if x.dtype == torch.float32 and max(rows, columns) >= 1.5 * min(rows, columns):
        x = _by_gram(x, steps)
    else:
        for _ in range(steps):
            x = _polynomial(x @ x.mT) @ x
    return (x.mT if rows > columns else x).to(stack.dtype)


def _by_gram(x: torch.Tensor, steps: int) -> torch.Tensor:
    gram = x @ x.mT
    z = product = _polynomial(gram)
    for _ in range(steps - 1):
        gram = z @ gram @ z
        z = _polynomial(gram)
        product = z @ product
    return product @ x


def _polynomial(gram: torch.Tensor) -> torch.Tensor:
    a, b, c = COEFFICIENTS
    z = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    z.diagonal(dim1=1, dim2=2).add_(a)
    return z


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum whose update is orthogonalised and scaled to AdamW's usual RMS (0.2 sqrt(max dim))."""

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0,
        cut_from: Mapping[nn.Parameter, Any] | None = None,
    ) -> None:  # fmt: skip
        self.cut_from = cut_from or {}  # parameter that is a worker's part -> how the matrix is cut
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            gradients = [p.grad for p in parameters]
            buffers = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in parameters]
            torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
            likes = [self.cut_from.get(p, p) for p in parameters]
            updates = torch._foreach_lerp(gradients, buffers, group["momentum"])
            directions = _orthogonalise_shared([whole(part, like) for part, like in zip(updates, likes, strict=True)])
            directions = [cut(full, like) for full, like in zip(directions, likes, strict=True)]
            if group["weight_decay"]:
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_mul_(directions, [group["lr"] * 0.2 * max(like.shape) ** 0.5 for like in likes])
            torch._foreach_sub_(parameters, directions)


def _orthogonalise_shared(matrices: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """`orthogonalise` of each matrix; equal shapes go together, and every worker does its share of each shape."""
    rank, workers = world()
    places: dict[torch.Size, list[int]] = {}
    for place, matrix in enumerate(matrices):
        places.setdefault(matrix.shape, []).append(place)
    done: list[torch.Tensor] = []
    for members in places.values():
        share = -(-len(members) // workers)
        mine = [members[min(rank * share + i, len(members) - 1)] for i in range(share)]  # the last one fills up
        done.append(orthogonalise(torch.stack([matrices[place] for place in mine])))
    flat = torch.cat([stack.reshape(-1) for stack in done])
    parts = [flat]
    if workers > 1:
        parts = [torch.empty_like(flat) for _ in range(workers)]
        dist.all_gather(parts, flat)
    directions: list[torch.Tensor] = list(matrices)
    offset = 0
    for stack, members in zip(done, places.values(), strict=True):
        stacks = torch.cat([part[offset : offset + stack.numel()].view_as(stack) for part in parts])
        for place, direction in zip(members, stacks, strict=False):
            directions[place] = direction
        offset += stack.numel()
    return directions

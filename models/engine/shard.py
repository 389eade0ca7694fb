"""Blocks whose weights are cut over the workers (FSDP2, torch's `fully_shard`), in place: no name changes.

Each block gathers its weights for its forward and backward pass and scatters its gradients' means. Optimizers, averages and
the norm see a worker's own parts as plain tensors; a checkpoint holds whole tensors, so any number of workers goes on
from it. Left out: cutting what lies outside the blocks, gathering the next block ahead of time, parts on two axes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._composable.checkpoint_activation import checkpoint

from models.engine.config import TrainConfig
from models.engine.distribute import world

M = TypeVar("M", bound=nn.Module)
BLOCK_LISTS = ("blocks", "transformer_blocks", "single_transformer_blocks")  # where diffusers' families keep them


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """Every block of every transformer inside."""
    return [b for m in module.modules() for name, child in m.named_children() if name in BLOCK_LISTS
            and isinstance(child, nn.ModuleList) for b in child]  # fmt: skip


def prepare_blocks(module: nn.Module, config: TrainConfig) -> None:
    """Compile, or recompute in the backward pass, every block of every transformer inside, in place: no name changes."""
    for block in blocks_of(module):
        if config.recompute:
            checkpoint(block)
        if config.compile:
            block.compile()


def shard_blocks(module: nn.Module, bf16: bool) -> None:
    """Cut the weights of every block; with `bf16` they are gathered in bfloat16, their gradients summed in float32."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    blocks = blocks_of(module)
    if not blocks:
        raise ValueError(f"shard: no list of blocks ({', '.join(BLOCK_LISTS)}) in this network to cut; set it to false")
    if frozen := [name for name, p in module.named_parameters() if not p.requires_grad]:
        raise ValueError(
            f"shard: {len(frozen)} weights are frozen, {frozen[0]} is one; whole networks are cut, set it to false"
        )
    mesh = init_device_mesh(next(module.parameters()).device.type, (world()[1],))
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)  # autocast decides about the inputs, as without shards
    if bf16:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True, mp_policy=policy)


def is_cut(tensor: torch.Tensor) -> bool:
    """Whether this worker has only a part of it."""
    return hasattr(tensor, "full_tensor")  # a DTensor, whose import costs a second


def part_of(tensor: Any) -> torch.Tensor:
    """This worker's part, in the same memory and without gradient; all of a tensor that is not cut."""
    part: torch.Tensor = tensor.detach().to_local() if is_cut(tensor) else tensor.detach()
    return part


def whole(part: torch.Tensor, like: Any) -> torch.Tensor:
    """The tensor whose parts the workers hold, cut as `like` is; all workers must ask."""
    if not is_cut(like):
        return part
    from torch.distributed.tensor import DTensor

    full: torch.Tensor = DTensor.from_local(
        part_of(part), like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    ).full_tensor()
    return full


def cut(full: torch.Tensor, like: Any) -> torch.Tensor:
    """This worker's part of a whole tensor that all workers have."""
    if not is_cut(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None).to_local()


def gathered(parts: Mapping[str, torch.Tensor], module: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors by the names of the module's parameters, whole, in main memory; on rank 0 alone, but all workers must ask."""
    likes, tensors = dict(module.named_parameters()), dict[str, torch.Tensor]()
    for name, part in parts.items():
        full = whole(part, likes[name])
        if world()[0] == 0:
            tensors[name] = full.cpu()
    return tensors


def clip_parts(parts: list[nn.Parameter], complete: list[nn.Parameter], most: float) -> torch.Tensor:
    """`clip_grad_norm_` where of some parameters a worker has parts; returns the norm over all workers."""
    own = torch.nn.utils.get_total_norm([p.grad for p in parts if p.grad is not None]).square()
    dist.all_reduce(own)
    norm = (own + torch.nn.utils.get_total_norm([p.grad for p in complete if p.grad is not None]).square()).sqrt()
    torch.nn.utils.clip_grads_with_norm_([*parts, *complete], most, norm)
    return norm


def hollow(module: M) -> M:
    """A copy without the weights that are trained, to be filled by `with_weights`; a cut module cannot be copied."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in module.parameters() if p.requires_grad
    }
    return copy.deepcopy(module, memo)

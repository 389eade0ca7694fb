"""Named weights put into a module."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import nn

from models.device import compute_device
from models.engine.shard import cut, part_of

M = TypeVar("M", bound=nn.Module)


def trainable_tensors(module: nn.Module, trainable: list[nn.Parameter]) -> dict[str, torch.Tensor]:
    """The trainable parameters of a module by name."""
    wanted = {id(p) for p in trainable}
    return {name: p.detach() for name, p in module.named_parameters() if id(p) in wanted}


@torch.no_grad()
def put_weights(module: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Overwrite the parameters of these names; others stay."""
    parameters = dict(module.named_parameters())
    for name, value in weights.items():
        part_of(parameters[name]).copy_(cut(value, parameters[name]))


def with_weights(module: M, weights: Mapping[str, torch.Tensor]) -> M:
    """A copy of the module with these of its weights replaced."""
    clone = copy.deepcopy(module)
    if any(p.is_meta for p in clone.parameters()):  # `hollow`
        clone.load_state_dict({name: value.clone() for name, value in weights.items()}, strict=False, assign=True)
        clone.to(compute_device())  # cut weights are gathered in main memory
    else:
        put_weights(clone, weights)
    return clone

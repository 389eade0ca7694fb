"""Named weights put into a module."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


@torch.no_grad()
def put_weights(module: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Overwrite the parameters of these names; others stay."""
    parameters = dict(module.named_parameters())
    for name, value in weights.items():
        parameters[name].copy_(value)


def with_weights(module: M, weights: Mapping[str, torch.Tensor]) -> M:
    """A copy of the module with these of its weights replaced."""
    clone = copy.deepcopy(module)
    put_weights(clone, weights)
    return clone

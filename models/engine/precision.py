"""What `precision: bf16` computes in bfloat16; weights, averages, times and losses stay float32.

On a GPU: torch's autocast. On a CPU: the products of linear layers and nothing else. torch's autocast for CPUs takes attention and
element-wise work into bfloat16 too, where they are slower than in float32 (attention's backward pass several times).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Precision = Literal["fp32", "bf16"]


def autocast(device: torch.device, precision: Precision, cut: bool = False) -> AbstractContextManager[object]:
    """A block whose matrix products are as precise as asked; `cut` weights come in bfloat16 already, so all follows them."""
    if precision == "fp32":
        return nullcontext()
    alone = device.type == "cpu" and not cut
    return HalfLinear() if alone else torch.autocast(device.type, torch.bfloat16)


class HalfLinear(TorchFunctionMode):
    """Linear layers multiply in bfloat16 with sums in float32, forward and backward; all else is left alone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Catch `linear` of float32."""
        if func is F.linear and args[0].dtype == torch.float32 and not kwargs:
            return half_linear(*args)
        return func(*args, **(kwargs or {}))


def half_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + b in float32 [..., O] of x [..., I] and W [O, I], the product in bfloat16."""
    product: torch.Tensor = _Product.apply(x, weight)  # type: ignore[no-untyped-call]
    return product if bias is None else product + bias


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        flat, half = x.flatten(0, -2).bfloat16(), weight.bfloat16()
        ctx.save_for_backward(x, weight, flat, half)
        return (flat @ half.T).float().view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, weight, flat, half = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of this gradient is wanted
            return half_linear(gradient, weight.T), half_linear(gradient.flatten(0, -2).T, x.flatten(0, -2).T)
        g = gradient.flatten(0, -2).bfloat16()
        by_x = (g @ half).float().view(x.shape) if ctx.needs_input_grad[0] else None
        return by_x, (g.T @ flat).float() if ctx.needs_input_grad[1] else None

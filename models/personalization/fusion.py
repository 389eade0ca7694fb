"""Fused mixes: on what each tuned model's layers read while it draws its subject, the mix does what that model does.

A sum adds every adapter's change on everybody's inputs. Here one change a layer is fitted instead, in closed form:

    min_W  sum_i |(W - dW_i) X_i|^2 + |W X_0|^2 + ridge |W|^2   ->   W = (sum_i dW_i C_i) (sum_i C_i + C_0 + ridge)^-1

with X_i the inputs of the layer while model i draws its own prompts, X_0 those of the base on ordinary prompts, and
C = X X^T / n. The first term is Mix-of-Show's gradient fusion (Gu et al. 2023, arXiv:2305.18292, eq. 4), solved as RegMean is (Jin et
al. 2022, arXiv:2212.09849, eq. 2); the term of ordinary prompts is ours. Left out: inputs of the mix itself, which differ from the
tuned models' the more layers lie below.

I, O: a layer's inputs and outputs; n: places it was asked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from models.engine.distribute import sum_over_workers

Moments = dict[str, Tensor]  # layer -> C [I, I], float64


def second_moments(module: nn.Module, layers: Iterable[str], draw: Callable[[], object]) -> Moments:
    """C of what the named linear layers read while `draw` runs, over all workers."""
    sums: Moments = {}
    counts: dict[str, Tensor] = {}

    def seen(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).double()
            sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + x.T @ x
            counts[name] = counts.get(name, torch.zeros((), dtype=torch.float64)) + len(x)

        return hook

    handles = [module.get_submodule(name).register_forward_pre_hook(seen(name)) for name in layers]
    try:
        draw()
    finally:
        for handle in handles:
            handle.remove()
    for each in (*sums.values(), *counts.values()):
        sum_over_workers(each)
    return {name: total / counts[name] for name, total in sums.items()}


def fused(
    changes: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    ordinary: Tensor,
    weight: float = 1.0,
    ridge: float = 1e-3,
) -> Tensor:
    """One layer's change [O, I] from the adapters' changes [O, I] and every adapter's C [I, I].

    An adapter without a change here wants none on its own inputs; C of ordinary prompts counts `weight` times.
    """
    kept = sum((change.double() @ moments[name] for name, change in sorted(changes.items())), torch.zeros(()))
    held = sum((moment for _, moment in sorted(moments.items())), weight * ordinary.double())
    held = held + ridge * held.diagonal().mean() * torch.eye(len(held), dtype=held.dtype)
    solved: Tensor = torch.linalg.solve(held, kept.T).T
    return solved.to(next(iter(changes.values())).dtype)

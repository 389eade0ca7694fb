"""Power-function EMA of weights (Karras et al. 2024, arXiv:2312.02696, eq. 2); no warm-up constant needed."""

from __future__ import annotations

import torch
from torch import nn


class PowerEma:
    """average <- beta_k * average + (1 - beta_k) * weights, beta_k = (1 - 1/(k+1))^gamma after the k-th update."""

    def __init__(self, module: nn.Module, gamma: float) -> None:
        self.gamma = gamma
        self.updates = 0
        self.average = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Fold the module's present weights into the average."""
        self.updates += 1
        beta = (1 - 1 / (self.updates + 1)) ** self.gamma if self.gamma > 0 else 0.0
        trained = {name: p for name, p in module.named_parameters() if name in self.average}
        targets = [self.average[name] for name in trained]
        torch._foreach_lerp_(targets, [p.detach() for p in trained.values()], 1 - beta)

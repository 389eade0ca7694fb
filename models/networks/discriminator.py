"""Critic heads on frozen features (ADD, arXiv:2311.17042, sec. 3.2; projection onto the text: arXiv:1802.05637).

One head per feature map: two 1x1 layers give a logit at every position, plus the inner product of the features with the
projected text, so that a sharp picture of the wrong thing is still refused.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F


class CriticHead(nn.Module):
    """Features [B, L, C] and text [B, D] -> logits [B, L]."""

    def __init__(self, channels: int, text_dim: int, width: int = 64) -> None:
        super().__init__()
        self.inside = nn.Sequential(nn.Linear(channels, width), nn.LayerNorm(width), nn.LeakyReLU(0.2))
        self.outside = nn.Linear(width, 1)
        self.text = nn.Linear(text_dim, width)

    def forward(self, features: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Logits at every position."""
        hidden = self.inside(features)
        matched = (hidden * self.text(text)[:, None]).mean(-1)
        logits: torch.Tensor = self.outside(hidden)[..., 0] + matched
        return logits


class Critic(nn.Module):
    """One head per feature map."""

    def __init__(self, channels: Sequence[int], text_dim: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.heads = nn.ModuleList(CriticHead(c, text_dim) for c in channels)

    def forward(self, features: Sequence[torch.Tensor], text: torch.Tensor) -> torch.Tensor:
        """Logits [B, K] over all positions of all maps; every map counts the same in their mean."""
        logits = [head(part, text) for head, part in zip(self.heads, features, strict=True)]
        longest = max(part.shape[1] for part in logits)
        return torch.cat([part.repeat_interleave(longest // part.shape[1], 1) for part in logits], 1)


def positions(maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Maps [B, C, h, w] as [B, h * w, C]."""
    return [m.flatten(2).transpose(1, 2) for m in maps]


def text_vector(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of the real tokens [B, D] of [B, T, D] under mask [B, T]."""
    weights = mask.to(tokens.dtype)[..., None]
    return (tokens * weights).sum(1) / weights.sum(1).clamp_min(1)


def hinge(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """The critic's loss per sample [B] (arXiv:1705.02894)."""
    return F.relu(1 - real).mean(1) + F.relu(1 + fake).mean(1)


def r1_penalty(critic: Critic, features: Sequence[torch.Tensor], text: torch.Tensor) -> torch.Tensor:
    """Squared norm of the gradient of the mean logit by the features of real pictures, per sample [B]."""
    features = [part.detach().requires_grad_(True) for part in features]
    logits = critic(features, text).mean(1)
    gradients = torch.autograd.grad(logits.sum(), features, create_graph=True)
    return torch.stack([g.square().flatten(1).sum(1) for g in gradients]).sum(0)

"""REPA: representation alignment (Yu et al. 2024, arXiv:2410.06940, eq. 8) with a frozen picture encoder.

loss = coefficient * mean over tokens of (1 - cos(projector(h), f(x_0))). Teacher features come with the batch on the
token grid (computed once, when the training set is encoded). Left out: attention alignment (HASTE), online teachers.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from models.pretraining.config import RepaConfig


class Projector(nn.Module):
    """Hidden tokens -> teacher features; trained, never exported."""

    def __init__(self, width: int, hidden: int, teacher_dim: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.inner = nn.Linear(width, hidden)
            self.out = nn.Linear(hidden, teacher_dim)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, L, width] -> [B, L, teacher_dim]."""
        projected: torch.Tensor = self.out(F.silu(self.inner(tokens)))
        return projected


class Repa:
    """The auxiliary term FlowMatching adds while `active`."""

    def __init__(self, config: RepaConfig, projector: Projector, steps: int) -> None:
        self.config, self.projector, self.stop = config, projector, round(config.until * steps)

    def active(self, step: int) -> bool:
        """False from the stop step on, for good."""
        return self.config.coefficient > 0 and step < self.stop

    def __call__(self, hidden: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Alignment loss per sample [B]; hidden [B, L, W] against teacher [B, h, w, E] with h * w == L."""
        b, h, w, e = teacher.shape
        if hidden.shape[1] != h * w:
            raise ValueError(f"teacher grid {h}x{w} has {h * w} cells but the denoiser has {hidden.shape[1]} tokens")
        cosine = F.cosine_similarity(self.projector(hidden), teacher.reshape(b, h * w, e).float(), dim=-1)
        return self.config.coefficient * (1 - cosine).mean(1)

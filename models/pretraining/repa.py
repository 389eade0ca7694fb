"""REPA: representation alignment (Yu et al. 2024, arXiv:2410.06940, eq. 8) with a frozen picture encoder.

loss = coefficient * mean over tokens of (1 - cos(projector(h), f(x_0))). Features come with the batch on the token grid
(computed once, when the training set is encoded) or from a frozen teacher (teachers.py), always of the clean picture.
iREPA (arXiv:2512.10794): a 3x3 convolution as projector and features standardised over the grid. HASTE
(arXiv:2505.16792): the term stops for good at a step. Left out: attention alignment (HASTE).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional as F

from models.engine.objective import Batch
from models.engine.randomness import Randomness
from models.networks.denoiser import Denoiser
from models.networks.routing import Route
from models.pretraining.config import RepaConfig

STD_FLOOR = 1e-6
Teacher = Callable[[torch.Tensor, tuple[int, int]], torch.Tensor]  # pictures, token grid -> features [B, h, w, E]


class Alignment(Protocol):
    """An auxiliary term on the hidden tokens of one block; FlowMatching adds it while `active`."""

    config: RepaConfig

    @property
    def projector(self) -> nn.Module | None:
        """What is trained beside the denoiser."""

    def active(self, step: int) -> bool:
        """False from the stop step on, for good."""

    def prepare(self, batch: Batch, rng: Randomness) -> Batch:
        """The batch with this step's targets, without gradient."""

    def term(self, hidden: torch.Tensor, batch: Batch, route: Route | None) -> torch.Tensor:
        """Loss per sample [B] of the tokens [B, L, W] after block `config.layer`."""

    def after_step(self, denoiser: Denoiser) -> None:
        """Bookkeeping after the denoiser moved."""

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must hold."""

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Inverse of `state`."""


class Projector(nn.Module):
    """Hidden tokens -> teacher features; trained, never exported."""

    def __init__(self, width: int, hidden: int, teacher_dim: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.inner = nn.Linear(width, hidden)
            self.out = nn.Linear(hidden, teacher_dim)

    def forward(self, tokens: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """[B, L, width] -> [B, L, teacher_dim]."""
        projected: torch.Tensor = self.out(F.silu(self.inner(tokens)))
        return projected


class ConvProjector(nn.Module):
    """iREPA's projector: one 3x3 convolution over the token grid."""

    def __init__(self, width: int, teacher_dim: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.out = nn.Conv2d(width, teacher_dim, 3, padding=1)

    def forward(self, tokens: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """[B, h w, width] -> [B, h w, teacher_dim]; `grid` is (h, w)."""
        if grid is None:
            raise ValueError("a conv projector needs the token grid (h, w); give it, or use projector: mlp")
        projected: torch.Tensor = self.out(tokens.mT.unflatten(2, grid)).flatten(2).mT
        return projected


def projector_of(config: RepaConfig, width: int, teacher_dim: int, seed: int) -> Projector | ConvProjector:
    """The projector the settings ask for; its weights are drawn without touching the global generator."""
    if config.projector == "conv":
        return ConvProjector(width, teacher_dim, seed)
    return Projector(width, config.hidden, teacher_dim, seed)


class Repa:
    """Alignment with an encoder's features of the clean picture."""

    def __init__(
        self, config: RepaConfig, projector: Projector | ConvProjector, steps: int, teacher: Teacher | None = None,
        patch_size: int = 4,
    ) -> None:  # fmt: skip
        self.config, self.projector, self.stop = config, projector, round(config.until * steps)
        self.teacher, self.patch_size = teacher, patch_size

    def active(self, step: int) -> bool:
        """False from the stop step on, for good."""
        return self.config.coefficient > 0 and step < self.stop

    def prepare(self, batch: Batch, rng: Randomness) -> Batch:
        """Features of the batch's pictures, if they did not come with it."""
        _, _, height, width = batch.images.shape
        h, w = height // self.patch_size, width // self.patch_size
        if batch.teacher is not None and batch.teacher.shape[1:3] != (h, w):
            _, rows, columns, _ = batch.teacher.shape
            raise ValueError(
                f"rows {list(batch.rows) or 'unknown'} have a teacher grid of {rows}x{columns}, but pictures of "
                f"{height}x{width} in patches of {self.patch_size} are {h}x{w} tokens (height x width); encode their features again"
            )
        if batch.teacher is not None or self.teacher is None:
            return batch
        with torch.no_grad():
            features = self.teacher(batch.images, (h, w))
        return replace(batch, teacher=features)

    def term(self, hidden: torch.Tensor, batch: Batch, route: Route | None) -> torch.Tensor:
        """Alignment loss per sample [B]."""
        if batch.teacher is None:
            raise ValueError(
                "REPA got a batch without teacher features; encode them, or name a teacher in repa.teacher"
            )
        return self(hidden, batch.teacher, route)

    def __call__(self, hidden: torch.Tensor, teacher: torch.Tensor, route: Route | None = None) -> torch.Tensor:
        """Loss [B]; hidden [B, L, W] (with a route around: the kept tokens) against teacher [B, h, w, E], h * w == L."""
        b, h, w, e = teacher.shape
        features = teacher.reshape(b, h * w, e).float()
        if self.config.spatial_norm is not None:
            features = spatially_normed(features, self.config.spatial_norm)
        if route is not None:
            features = route.visible(features)
        if hidden.shape[1] != features.shape[1]:
            raise ValueError(
                f"teacher grid {h}x{w} has {features.shape[1]} cells but the denoiser has {hidden.shape[1]} tokens"
            )
        cosine = F.cosine_similarity(self.projector(hidden, (h, w)).float(), features, dim=-1)
        return self.config.coefficient * (1 - cosine).mean(1)

    def after_step(self, denoiser: Denoiser) -> None:
        """Nothing to keep."""

    def state(self) -> dict[str, torch.Tensor]:
        """Nothing: the stop is a step."""
        return {}

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Nothing."""


def spatially_normed(features: torch.Tensor, share: float) -> torch.Tensor:
    """iREPA: features [B, L, E] less `share` of their mean over the tokens, over their standard deviation there."""
    mean = features.mean(1, keepdim=True)
    return (features - share * mean) / (features.std(1, keepdim=True, correction=0) + STD_FLOOR)

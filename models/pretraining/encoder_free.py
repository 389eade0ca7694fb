"""Alignment without an encoder: the dispersive loss and self-representation alignment.

Dispersive (Wang and He 2025, arXiv:2506.09027, InfoNCE without positives, l2): log of the mean over pairs of
exp(-|z_i - z_j|^2 / tau), z the flattened hidden tokens over the root of their number. SRA (arXiv:2505.02831): the hidden
tokens follow those of an averaged copy of the network, of a deeper block, at less noise. Pairs are formed within a worker
(as in the paper's code), so the dispersive loss depends on how a batch is shared; SRA does not.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from models.engine.objective import Batch
from models.engine.randomness import Randomness
from models.networks.denoiser import Denoiser
from models.networks.routing import Route
from models.pretraining.config import RepaConfig
from models.pretraining.repa import Projector

AVERAGE_DECAY = 0.9999


class Dispersive:
    """Pushes the hidden tokens of different samples apart."""

    projector: nn.Module | None = None

    def __init__(self, config: RepaConfig, steps: int) -> None:
        self.config, self.stop = config, round(config.until * steps)

    def active(self, step: int) -> bool:
        """False from the stop step on, for good."""
        return self.config.coefficient > 0 and step < self.stop

    def prepare(self, batch: Batch, rng: Randomness) -> Batch:
        """Needs no targets."""
        return batch

    def term(self, hidden: torch.Tensor, batch: Batch, route: Route | None) -> torch.Tensor:
        """The same number for every sample [B]; 0 for a single one."""
        b = len(hidden)
        if b == 1:
            return hidden.new_zeros(1)
        z = hidden.float().flatten(1)
        squared = F.pdist(z).square() / z.shape[1]
        pairs = torch.cat(
            [squared, squared, z.new_zeros(b)]
        )  # every ordered pair and, as in the paper, each with itself
        value = torch.logsumexp(-pairs / self.config.temperature, 0) - torch.log(z.new_tensor(float(b * b)))
        return self.config.coefficient * value.expand(b)

    def after_step(self, denoiser: Denoiser) -> None:
        """Nothing to keep."""

    def state(self) -> dict[str, torch.Tensor]:
        """Nothing."""
        return {}

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Nothing."""


class SelfAlignment:
    """Follows an averaged copy of the network that sees less noise."""

    def __init__(self, config: RepaConfig, projector: Projector, denoiser: Denoiser, steps: int) -> None:
        self.config, self.projector, self.stop = config, projector, round(config.until * steps)
        self.average = copy.deepcopy(denoiser).eval().requires_grad_(False)
        self.updates = 0
        depth = denoiser.depth
        self.target_layer = depth - 1 if config.target_layer is None else config.target_layer

    def active(self, step: int) -> bool:
        """False from the stop step on, for good."""
        return self.config.coefficient > 0 and step < self.stop

    @torch.no_grad()
    def prepare(self, batch: Batch, rng: Randomness) -> Batch:
        """The averaged network's tokens at t - gap."""
        t = (batch.extra["t"] - self.config.time_gap * rng.uniform("self alignment")).clamp_min(0)
        x_t = torch.lerp(batch.images, batch.extra["eps"], t.view(-1, 1, 1, 1))
        _, tokens = self.average(x_t, t, batch.tokens, batch.mask, self.target_layer)
        assert tokens is not None
        return replace(batch, extra={**batch.extra, "followed": tokens})

    def term(self, hidden: torch.Tensor, batch: Batch, route: Route | None) -> torch.Tensor:
        """Smooth l1 distance per sample [B]."""
        followed = batch.extra["followed"]
        if route is not None:
            followed = route.visible(followed)
        distance = F.smooth_l1_loss(self.projector(hidden).float(), followed.float(), reduction="none", beta=0.05)
        return self.config.coefficient * distance.mean((1, 2))

    @torch.no_grad()
    def after_step(self, denoiser: Denoiser) -> None:
        """Fold the moved weights into the average, faster at first."""
        self.updates += 1
        decay = min(AVERAGE_DECAY, (1 + self.updates) / (10 + self.updates))
        own, theirs = [p.data for p in self.average.parameters()], [p.detach() for p in denoiser.parameters()]
        torch._foreach_lerp_(own, theirs, 1 - decay)

    def state(self) -> dict[str, torch.Tensor]:
        """The averaged weights and the number of updates."""
        return {**dict(self.average.named_parameters()), "updates": torch.tensor(self.updates)}

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Inverse of `state`."""
        self.updates = int(tensors["updates"])
        with torch.no_grad():
            for name, parameter in self.average.named_parameters():
                parameter.copy_(tensors[name])

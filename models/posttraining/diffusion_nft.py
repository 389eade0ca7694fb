"""DiffusionNFT (Zheng et al. 2025, arXiv:2509.16117, eq. 5-7): reinforcement on the forward process, no likelihoods.

Pictures x_0 come from the `old` policy by the ODE. With r = 1/2 + clip(A/5, +-1)/2 and the implicit policies
    x+ = beta x_theta + (1 - beta) x_old,   x- = (1 + beta) x_old - beta x_theta
(x_0-predictions at a noised x_t; linear in the velocity's), the loss is
    r ||x+ - x_0||^2 / w+ + (1 - r) ||x- - x_0||^2 / w- + kl ||v_theta - v_reference||^2,
w the sample's detached mean |error|. At theta = old and r = 1/2 both branches cancel. The old policy follows the new
one by old <- d old + (1 - d) new with d = min(old_rate step, old_most). Guidance of the rollouts is an option here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import nn

from models.engine.objective import Batch, Loss
from models.engine.precision import autocast
from models.engine.randomness import Randomness
from models.engine.weights import put_weights
from models.networks.denoiser import Denoiser, velocity_of
from models.posttraining.advantages import LARGEST, weighted_advantages
from models.posttraining.config import NftConfig
from models.posttraining.reward import Weighted, score
from models.posttraining.rollout import Sampling
from models.pretraining.flow_matching import noised
from models.pretraining.timesteps import draw_times

LEAST_SCALE = 1e-5


class DiffusionNft:
    """Player `policy`. A batch holds groups of neighbouring slots with one prompt; its pictures only give their size."""

    def __init__(
        self, policy: Denoiser, reference: Denoiser | None, rewards: Sequence[Weighted], sampling: Sampling,
        config: NftConfig,
    ) -> None:  # fmt: skip
        if (config.kl > 0) != (reference is not None):
            raise ValueError(f"kl={config.kl} and a reference go together; give both or neither")
        self.policy, self.rewards, self.config = policy.eval(), rewards, config
        self.sampling = replace(sampling, guidance=config.guidance)
        self.reference = None if reference is None else reference.eval().requires_grad_(False)
        self.old = copy.deepcopy(self.policy).requires_grad_(False)

    @property
    def players(self) -> Mapping[str, nn.Module]:
        """One player: the policy; the old one only follows."""
        return {"policy": self.policy}

    def turns(self, step: int) -> Sequence[str]:
        """The policy moves in every step."""
        return ("policy",)

    @torch.no_grad()
    def prepare(self, batch: Batch, rng: Randomness) -> Batch:
        """The old policy's pictures with their share r, noised to t, and its and the reference's predictions there."""
        shape = tuple(batch.images.shape[1:])
        noise = rng.normal("noise", shape)
        times = self.sampling.times(self.config.steps, noise)
        with self._precision(batch):
            drawn = self.sampling.follow(self.old, noise, times, batch)
        x_0 = self.sampling.codec.settled(drawn)
        rewards = score(self.rewards, self.sampling.pictures(x_0), batch)
        weights = [term.weight for term in self.rewards]
        advantage, idle = weighted_advantages(rewards, weights, self.config.group, batch.slots, self.config.unit)
        tokens = shape[1] * shape[2] // self.sampling.patch_size**2
        t = draw_times(rng, tokens, self.config.timesteps)
        x_t = noised(x_0, rng.normal("eps", shape), t)
        extra = {
            "x_0": x_0, "t": t, "x_t": x_t, "rewards": rewards, "idle": idle,
            "share": 0.5 + (advantage / LARGEST).clamp(-1, 1) / 2,
        }  # fmt: skip
        with self._precision(batch):  # as the loss has it, or the branches would not cancel at the old policy
            extra["old"] = self.old(x_t, t, batch.tokens, batch.mask)[0]
            if self.reference is not None:
                extra["anchor"] = self.reference(x_t, t, batch.tokens, batch.mask)[0]
        return replace(batch, extra={**batch.extra, **extra})

    def _precision(self, batch: Batch) -> AbstractContextManager[object]:
        return autocast(batch.images.device, self.config.train.precision)

    def loss(self, player: str, batch: Batch) -> Loss:
        """Both branches and the squared velocity change."""
        extra, beta = batch.extra, self.config.beta
        x_t, t, share = extra["x_t"], extra["t"], extra["share"]
        x, _ = self.policy(x_t, t, batch.tokens, batch.mask)
        towards = scaled_error(beta * x + (1 - beta) * extra["old"], extra["x_0"])
        away = scaled_error((1 + beta) * extra["old"] - beta * x, extra["x_0"])
        total = (share * towards + (1 - share) * away).mean()
        parts = {"towards": towards.detach().mean(), "away": away.detach().mean(), "idle_groups": extra["idle"]}
        parts |= {term.reward.card.name: r.mean() for term, r in zip(self.rewards, extra["rewards"], strict=True)}
        if self.reference is not None:
            clamp = self.policy.t_clamp
            change = (velocity_of(x, x_t, t, clamp) - velocity_of(extra["anchor"], x_t, t, clamp)).square().mean()
            parts["drift"] = change.detach()
            total = total + self.config.kl * change
        return Loss(total, parts)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """The old policy follows."""
        kept = min(self.config.old_rate * step, self.config.old_most)
        for old, new in zip(self.old.parameters(), self.policy.parameters(), strict=True):
            old.lerp_(new, 1 - kept)

    def state(self) -> dict[str, torch.Tensor]:
        """The old policy's weights, for the checkpoint."""
        return {name: p.detach() for name, p in self.old.named_parameters()}

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Inverse of `state`."""
        put_weights(self.old, tensors)


def scaled_error(x: torch.Tensor, x_0: torch.Tensor) -> torch.Tensor:
    """Mean squared error of a sample [B] over its detached mean absolute error."""
    error = (x - x_0).flatten(1)
    return error.square().mean(1) / error.detach().abs().mean(1).clamp_min(LEAST_SCALE)

"""ReFL (Xu et al. 2023, arXiv:2304.05977, alg. 1) for flow matching, with its pre-training term.

A rollout with guidance runs without gradient to one of the last steps; from there ONE prediction x_0 is made with
gradient and shown to a differentiable reward: loss = weight relu(hinge - (r - mean) / sigma) + pretraining FM(real).
The hinge is in the reward's sigmas, above it the reward pulls no more. The clamp to the pixel range is straight-through:
a saturated pixel still gets gradient. The pre-training term has its own pictures and captions. Both terms are one loss,
so they stay in step (the public code has the term in no or in other micro-batches). Left out: feedback to the VAE.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from models.engine.objective import Batch, Loss
from models.engine.randomness import Randomness
from models.networks.denoiser import Denoiser
from models.posttraining.config import ReflConfig
from models.posttraining.reward import Composite
from models.posttraining.rollout import Sampling
from models.pretraining.flow_matching import noised, velocity_error
from models.pretraining.timesteps import draw_times


class Refl:
    """Player `denoiser`. A batch asks prompts; `extra` holds `real`, `real_tokens`, `real_mask` of other pictures."""

    def __init__(self, denoiser: Denoiser, reward: Composite, sampling: Sampling, config: ReflConfig) -> None:
        self.denoiser, self.reward, self.sampling, self.config = denoiser.eval(), reward, sampling, config

    @property
    def players(self) -> Mapping[str, nn.Module]:
        """One player: the denoiser."""
        return {"denoiser": self.denoiser}

    def turns(self, step: int) -> Sequence[str]:
        """The denoiser moves in every step."""
        return ("denoiser",)

    @torch.no_grad()
    def prepare(self, batch: Batch, rng: Randomness) -> Batch:
        """The rollout up to the step that gets gradient, the same for all workers; noise of the pre-training term."""
        noise = rng.normal("noise", tuple(batch.images.shape[1:]))
        times = self.sampling.times(self.config.steps, noise)
        late = max(1, round(self.config.late * self.config.steps))
        last = self.config.steps - 1 - int(torch.randint(late, (), generator=rng.shared("late step")))
        x = self.sampling.follow(self.denoiser, noise, times[: last + 1], batch)
        _, _, h, w = batch.extra["real"].shape
        t = draw_times(rng, h * w // self.sampling.patch_size**2, self.config.timesteps)
        eps = rng.normal("eps", tuple(batch.extra["real"].shape[1:]))
        extra = {"x": x, "time": torch.tensor(times[last], dtype=torch.float64), "t": t, "eps": eps}
        return replace(batch, extra={**batch.extra, **extra})

    def loss(self, player: str, batch: Batch) -> Loss:
        """The hinge on one predicted picture, and flow matching."""
        extra, config = batch.extra, self.config
        x_0 = self.sampling.x_0(self.denoiser, extra["x"], float(extra["time"]), batch)
        card = self.reward.card
        reward = (
            self.reward(straight_through_clamp(self.sampling.codec.pictures(x_0)), batch) - card.mean
        ) / card.sigma
        hinge = F.relu(config.hinge - reward).mean()
        real = extra["real"]
        x_t = noised(real, extra["eps"], extra["t"])
        predicted, _ = self.denoiser(x_t, extra["t"], extra["real_tokens"], extra["real_mask"])
        flow = velocity_error(predicted, real, extra["t"], self.denoiser.t_clamp).mean()
        parts = {
            "reward": reward.detach().mean(), "reached": (reward.detach() >= config.hinge).float().mean(),
            "flow": flow.detach(),
        }  # fmt: skip
        return Loss(config.weight * hinge + config.pretraining * flow, parts)

    def after_step(self, step: int) -> None:
        """Nothing to keep."""


def straight_through_clamp(x: torch.Tensor) -> torch.Tensor:
    """The value clamped to [-1, 1], the gradient passed on as it comes."""
    return x + (x.clamp(-1, 1) - x).detach()

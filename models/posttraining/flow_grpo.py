"""Flow-GRPO (Liu et al. 2025, arXiv:2505.05470): policy gradient through a sampler with known log-probabilities.

Rollouts take `steps` steps, fewer than inference does (denoising reduction). A window of them is stochastic (sde.py), the
rest follow the ODE (MixGRPO arXiv:2507.21802, Flow-GRPO-Fast); only the window is trained. With the group's advantage A
(advantages.py) and ratio rho = exp(log p - log p_old), both per element:
    loss = mean over window and samples of max(-A rho, -A clip(rho, 1 - c, 1 + c)) + kl KL(policy || reference).
The policy is the guided sampler, so guidance is inside rollouts and training; gradient goes through both of its
branches. With one update per batch rho is 1 and the clip is idle: that is normal. Rollouts are as precise as the loss
(`train.precision`), or rho would not be 1; a first move that is off all the same is told of. Left out: GRPO-Guard's
recentred ratio.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import nn

from models.engine.objective import Batch, Loss
from models.engine.precision import autocast
from models.engine.randomness import Randomness
from models.networks.denoiser import Denoiser
from models.posttraining.advantages import weighted_advantages
from models.posttraining.config import GrpoConfig
from models.posttraining.reward import Weighted, score
from models.posttraining.rollout import Sampling
from models.posttraining.sde import kl, log_prob, transition

FIRST_OFF = 0.1  # of the clip range: more than a ratio may be off 1 before the first move

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stem:
    """States that samples share: one of `asked` for each of `rows` (places of their first samples), `branch` [B] of them."""

    asked: Batch
    rows: torch.Tensor
    branch: torch.Tensor

    @classmethod
    def single(cls, batch: Batch) -> Stem:
        """Every sample has its own."""
        every = torch.arange(len(batch.slots))
        return cls(batch, every, every)

    @classmethod
    def shared(cls, batch: Batch, group: int) -> Stem:
        """One for each group of which samples are here."""
        _, branch = torch.unique(torch.tensor(batch.slots) // group, return_inverse=True)
        rows = torch.stack([(branch == i).nonzero()[0, 0] for i in range(int(branch.max()) + 1)])
        return cls(replace(batch, tokens=batch.tokens[rows], mask=batch.mask[rows]), rows, branch)


class FlowGrpo:
    """Player `policy`. A batch holds groups of neighbouring slots with one prompt; its pictures only give their size."""

    def __init__(
        self, policy: Denoiser, reference: Denoiser | None, rewards: Sequence[Weighted], sampling: Sampling,
        config: GrpoConfig,
    ) -> None:  # fmt: skip
        if (config.kl > 0) != (reference is not None):
            raise ValueError(f"kl={config.kl} and a reference go together; give both or neither")
        self.policy, self.rewards, self.config = policy.eval(), rewards, config
        self.sampling = sampling if config.guidance is None else replace(sampling, guidance=config.guidance)
        self.reference = None if reference is None else reference.eval().requires_grad_(False)
        self.unmoved, self.told = 0, False  # samples whose first loss is still to come; whether one was off

    @property
    def players(self) -> Mapping[str, nn.Module]:
        """One player: the policy."""
        return {"policy": self.policy}

    def turns(self, step: int) -> Sequence[str]:
        """As many moves on one batch of rollouts as the config says."""
        return ("policy",) * self.config.updates

    def window(self, rng: Randomness) -> range:
        """Indices of this step's stochastic steps; the last step is never one."""
        first = self.config.window_from
        places = self.config.steps - self.config.window - first
        match self.config.window_moves:
            case "stays":
                start = first
            case "random":
                start = first + int(torch.randint(places, (), generator=rng.shared("window")))
            case "progressive":
                start = first + rng.step // self.config.window_every % places
        return range(start, start + self.config.window)

    @torch.no_grad()
    def prepare(self, batch: Batch, rng: Randomness) -> Batch:
        """Rollouts with their stored states, rewards and advantages."""
        shape, window = tuple(batch.images.shape[1:]), self.window(rng)
        stem = self._stem(batch)  # walked until the first stochastic step, where its branches part
        x = self._first_noise(rng, shape)[stem.rows]
        states, results, log_probs, anchors = [], [], [], []
        for i, (t, s) in enumerate(pairwise(self.sampling.times(self.config.steps, x))):
            if i not in window:
                x = x + (s - t) * self._velocity(self.policy, x, t, stem.asked)
                continue
            mean, std = self._mean(self.policy, x, t, s, stem)
            states.append(x[stem.branch])
            if self.reference is not None:
                anchors.append(self._mean(self.reference, x, t, s, stem)[0])
            x = mean + std * rng.normal(f"step {i}", shape)
            stem = Stem.single(batch)
            results.append(x)
            log_probs.append(log_prob(x, mean, std))
        rewards = score(self.rewards, self.sampling.pictures(x), batch)
        weights = [term.weight for term in self.rewards]
        advantage, idle = weighted_advantages(rewards, weights, self.config.group, batch.slots, self.config.unit)
        extra = {
            "states": torch.stack(states), "results": torch.stack(results), "log_probs": torch.stack(log_probs),
            "window": torch.tensor(list(window)), "rewards": rewards, "advantage": advantage, "idle": idle,
            "pictures": x,
        }  # fmt: skip
        if anchors:
            extra["anchors"] = torch.stack(anchors)
        self.unmoved = len(batch.slots)
        return replace(batch, extra={**batch.extra, **extra})

    def _first_noise(self, rng: Randomness, shape: tuple[int, ...]) -> torch.Tensor:
        if self.config.same_noise:
            group = self.config.group
            rng = replace(rng, slots=tuple(slot // group * group for slot in rng.slots))
        return rng.normal("noise", shape)

    def _stem(self, batch: Batch) -> Stem:
        return Stem.shared(batch, self.config.group) if self.config.same_noise else Stem.single(batch)

    def _velocity(self, net: Denoiser, x: torch.Tensor, t: float, asked: Batch) -> torch.Tensor:
        with autocast(x.device, self.config.train.precision):
            return self.sampling.velocity(net, x, t, asked)

    def _mean(self, net: Denoiser, x: torch.Tensor, t: float, s: float, stem: Stem) -> tuple[torch.Tensor, float]:
        v = self._velocity(net, x, t, stem.asked)
        mean, std = transition(self.config.sampler, x, v, t, s, self.config.eta)
        return mean[stem.branch], std

    def loss(self, player: str, batch: Batch) -> Loss:
        """The clipped surrogate and the KL, mean over window and samples."""
        extra, clip = batch.extra, self.config.clip_range
        times = self.sampling.times(self.config.steps, batch.images)
        terms, ratios, drifts = [], [], []
        for k, i in enumerate(extra["window"].tolist()):
            stem = Stem.single(batch) if k else self._stem(batch)
            mean, std = self._mean(self.policy, extra["states"][k][stem.rows], times[i], times[i + 1], stem)
            ratio = (log_prob(extra["results"][k], mean, std) - extra["log_probs"][k]).exp()
            terms.append(surrogate(ratio, extra["advantage"], clip))
            ratios.append(ratio.detach())
            if self.reference is not None:
                drifts.append(kl(mean, extra["anchors"][k], std))
        total = torch.stack(terms).mean()
        off = (torch.stack(ratios) - 1).abs()
        self._tell_of(off, len(batch.slots))
        parts = {"ratio_off": off.max(), "clipped": (off > clip).float().mean(), "idle_groups": extra["idle"]}
        parts |= {term.reward.card.name: r.mean() for term, r in zip(self.rewards, extra["rewards"], strict=True)}
        if drifts:
            drift = torch.stack(drifts).mean()
            parts["kl"] = drift.detach()
            total = total + self.config.kl * drift
        return Loss(total, parts)

    def _tell_of(self, off: torch.Tensor, samples: int) -> None:
        """Warn, once a run, of a ratio that is off before the weights have moved."""
        first, self.unmoved = self.unmoved > 0, max(0, self.unmoved - samples)
        limit = FIRST_OFF * self.config.clip_range
        if first and not self.told and float(off.max()) > limit:
            self.told = True
            log.warning(
                "ratio off 1 by %.2g before the first move, above %.2g (a tenth of clip_range=%g): rollouts and loss do not "
                "compute the same; set train.precision to fp32, or train.accumulate to 1",
                float(off.max()), limit, self.config.clip_range,
            )  # fmt: skip

    def after_step(self, step: int) -> None:
        """Nothing to keep."""


def surrogate(ratio: torch.Tensor, advantage: torch.Tensor, clip: float) -> torch.Tensor:
    """PPO's pessimistic loss per sample: no gain beyond 1 +- clip in the direction the advantage points (arXiv:1707.06347)."""
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))

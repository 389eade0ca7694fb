"""Distribution matching distillation: DMD2 (Yin et al. 2024, arXiv:2405.14867), DMD1 (arXiv:2311.18828, eq. 7-8).

x = G(input, t_k). The generator moves along s_fake - s_real, in x_0-form and normalised per sample:
    grad = (x_0^fake(x_t) - x_0^real(x_t)) / mean|x - x_0^real(x_t)|,   loss = 1/2 ||x - sg(x - grad)||^2,
x_t = x noised to t in [0.02, 0.98]. The fake score is a flow model of the generator's own pictures and moves in every
step, the generator in every `fake_steps`-th (two time scales). Its input comes from its own earlier steps, not from
data (backward simulation); the step index is one for all workers. Options: a critic head on the fake score's tokens
(logistic, on noised pictures) and DMD1's perceptual regression on stored teacher pairs. Left out: EDM's weighting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from models.distillation.config import DmdConfig
from models.distillation.consistency import Null
from models.distillation.grid import Schedule
from models.distillation.perceptual import Distance
from models.engine.config import OptimizerConfig
from models.engine.objective import Batch, Loss
from models.engine.randomness import Randomness
from models.networks.denoiser import Denoiser
from models.networks.discriminator import CriticHead, text_vector
from models.pretraining.flow_matching import noised, velocity_error
from models.sampling.euler import guided_x_0

LEAST, MOST = 0.02, 0.98
LEAST_SCALE = 1e-5


class DistributionMatching:
    """Players: `student` (the generator) and `fake` (its score, with the critic's head if there is one)."""

    def __init__(
        self, student: Denoiser, teacher: Denoiser, fake: Denoiser, null: Null, config: DmdConfig, student_steps: int,
        guidance: float, schedule: Schedule = Schedule(), head: CriticHead | None = None,
        regression: Distance | None = None, optimizers: Mapping[str, OptimizerConfig] | None = None,
    ) -> None:  # fmt: skip
        if (config.gan_weight > 0) != (head is not None):
            raise ValueError(f"gan_weight={config.gan_weight} and a critic head go together; give both or neither")
        if (config.regression_weight > 0) != (regression is not None):
            raise ValueError(f"regression_weight={config.regression_weight} and a distance go together")
        self.student, self.null, self.config, self.guidance = student, null, config, guidance
        self.teacher = teacher.eval().requires_grad_(False)
        self.fake = nn.ModuleDict({"denoiser": fake} | ({} if head is None else {"head": head}))
        self.steps, self.schedule, self.regression = student_steps, schedule, regression
        self.optimizers = dict(optimizers or {})

    @property
    def players(self) -> Mapping[str, nn.Module]:
        """The generator and its fake score."""
        return {"student": self.student, "fake": self.fake}

    def turns(self, step: int) -> Sequence[str]:
        """The fake score moves in every step, the student before it in every `fake_steps`-th."""
        return ("student", "fake") if step % self.config.fake_steps == 0 else ("fake",)

    @torch.no_grad()
    def prepare(self, batch: Batch, rng: Randomness) -> Batch:
        """The generator's input by backward simulation, times and noises of both scores."""
        shape = tuple(batch.images.shape[1:])
        k = int(torch.randint(self.steps, (), generator=rng.shared("student step")))
        x = rng.normal("noise", shape)
        for i in range(k):
            x_0 = self._generate(x, self._time(i, batch.images), batch)
            x = noised(x_0, rng.normal(f"noise {i + 1}", shape), self._time(i + 1, batch.images))
        extra = {
            "input": x, "t_k": self._time(k, batch.images),
            "t": LEAST + (MOST - LEAST) * rng.stratified("score time"), "eps": rng.normal("score noise", shape),
            "t_fake": rng.stratified("fake time"), "eps_fake": rng.normal("fake noise", shape),
        }  # fmt: skip
        return replace(batch, extra={**batch.extra, **extra})

    def _time(self, i: int, images: torch.Tensor) -> torch.Tensor:
        """The student's i-th time [B], from 1 down."""
        return self.schedule.at(images.new_full((len(images),), self.steps - i), self.steps, images)

    def _generate(self, x: torch.Tensor, t: torch.Tensor, batch: Batch) -> torch.Tensor:
        x_0: torch.Tensor
        x_0, _ = self.student(x, t, batch.tokens, batch.mask)
        return x_0

    def loss(self, player: str, batch: Batch) -> Loss:
        """The generator's or the fake score's."""
        return self._student_loss(batch) if player == "student" else self._fake_loss(batch)

    def _student_loss(self, batch: Batch) -> Loss:
        x = self._generate(batch.extra["input"], batch.extra["t_k"], batch)
        batch.extra["generated"] = x.detach()
        gradient = self._gradient(x.detach(), batch)
        matching = 0.5 * (x - (x.detach() - gradient)).square().mean()
        total, parts = matching, {"matching": matching.detach(), "gradient": gradient.abs().mean()}
        if self.config.gan_weight > 0:
            adversarial = F.softplus(-self._logits(noised(x, batch.extra["eps"], batch.extra["t"]), batch)).mean()
            total = total + self.config.gan_weight * adversarial
            parts["adversarial"] = adversarial.detach()
        if self.regression is not None:
            one = self._time(0, x)
            regressed = self.regression(self._generate(batch.extra["noise"], one, batch), batch.images).mean()
            total = total + self.config.regression_weight * regressed
            parts["regression"] = regressed.detach()
        return Loss(total, parts)

    @torch.no_grad()
    def _gradient(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        """(x_0^fake - x_0^real) / mean|x - x_0^real|, per sample; a sample that is not finite is left where it is."""
        t = batch.extra["t"]
        x_t = noised(x, batch.extra["eps"], t)
        real = guided_x_0(self.teacher, x_t, t, batch.tokens, batch.mask, self.null, self.guidance)
        fake, _ = self.fake["denoiser"](x_t, t, batch.tokens, batch.mask)
        scale = (x - real).abs().mean((1, 2, 3), keepdim=True).clamp_min(LEAST_SCALE)
        return torch.nan_to_num((fake - real) / scale, 0.0, 0.0, 0.0)

    def _fake_loss(self, batch: Batch) -> Loss:
        """Flow matching on the generator's pictures; the critic's head learns to tell noised real from noised made."""
        if "generated" not in batch.extra:
            with torch.no_grad():
                batch.extra["generated"] = self._generate(batch.extra["input"], batch.extra["t_k"], batch)
        x, t = batch.extra["generated"], batch.extra["t_fake"]
        x_t = noised(x, batch.extra["eps_fake"], t)
        layer = self.config.gan_layer if self.config.gan_weight > 0 else None
        x_0, hidden = self.fake["denoiser"](x_t, t, batch.tokens, batch.mask, layer)
        score = velocity_error(x_0, x, t, self.student.t_clamp).mean()
        if hidden is None:
            return Loss(score, {"score": score.detach()})
        text = text_vector(batch.tokens, batch.mask)
        made = self.fake["head"](hidden, text)
        real = self._logits(noised(batch.images, batch.extra["eps_fake"], t), batch, t)
        critic = (F.softplus(made) + F.softplus(-real)).mean()
        told = 0.5 * ((made.mean(1) < 0).float().mean() + (real.mean(1) > 0).float().mean())
        return Loss(score + self.config.gan_weight * critic, {"score": score.detach(), "critic_accuracy": told})

    def _logits(self, x_t: torch.Tensor, batch: Batch, t: torch.Tensor | None = None) -> torch.Tensor:
        """The critic's logits [B, L] on noised pictures."""
        at = batch.extra["t"] if t is None else t
        _, hidden = self.fake["denoiser"](x_t, at, batch.tokens, batch.mask, self.config.gan_layer)
        logits: torch.Tensor = self.fake["head"](hidden, text_vector(batch.tokens, batch.mask))
        return logits

    def after_step(self, step: int) -> None:
        """Nothing to keep."""

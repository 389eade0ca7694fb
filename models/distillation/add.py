"""Adversarial diffusion distillation: ADD (Sauer et al. 2023, arXiv:2311.17042, eq. 1-5) and LADD (arXiv:2403.12015).

x = G(x_tau, tau) for data noised to one of the student's times. Critic heads read frozen features - of the picture by
an image encoder (ADD) or of the noised picture by the teacher's own blocks (LADD) - and the text; hinge loss with R1 on
the features. Distillation: c(t) ||x - sg x_0^teacher(noise(sg x, t))||^2, c(t) = 1 - t, guided.
Left out: image conditioning of the critic. The critic is not told the time of the noised picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from models.distillation.config import AddConfig
from models.distillation.consistency import Null
from models.distillation.grid import Schedule
from models.engine.config import OptimizerConfig
from models.engine.objective import Batch, Loss
from models.engine.randomness import Randomness
from models.networks.denoiser import Denoiser
from models.networks.discriminator import Critic, hinge, positions, r1_penalty, text_vector
from models.pretraining.flow_matching import noised
from models.sampling.euler import guided_x_0


class AdversarialDistillation:
    """Players: `student` and `critic`. Both move in every step, the student first."""

    def __init__(
        self, student: Denoiser, teacher: Denoiser, critic: Critic, encoder: nn.Module | None, null: Null,
        config: AddConfig, student_steps: int, guidance: float, schedule: Schedule = Schedule(),
        optimizers: Mapping[str, OptimizerConfig] | None = None,
    ) -> None:  # fmt: skip
        if (config.features == "image_encoder") != (encoder is not None):
            raise ValueError(f"features={config.features!r} but the encoder is {'given' if encoder else 'missing'}")
        self.student, self.critic, self.encoder, self.null = student, critic, encoder, null
        self.teacher = teacher.eval().requires_grad_(False)
        self.config, self.steps, self.guidance, self.schedule = config, student_steps, guidance, schedule
        self.optimizers = dict(optimizers or {})

    @property
    def players(self) -> Mapping[str, nn.Module]:
        """The student and its critic."""
        return {"student": self.student, "critic": self.critic}

    def turns(self, step: int) -> Sequence[str]:
        """One move each."""
        return ("student", "critic")

    @torch.no_grad()
    def prepare(self, batch: Batch, rng: Randomness) -> Batch:
        """Data noised to a student's time per sample; the noise and time of the teacher and of the critic."""
        shape = tuple(batch.images.shape[1:])
        index = (rng.stratified("student time") * self.steps).long() + 1
        tau = self.schedule.at(index, self.steps, batch.images)
        extra = {
            "tau": tau, "input": noised(batch.images, rng.normal("noise", shape), tau),
            "t": self.config.most_noise * rng.stratified("teacher time"), "eps": rng.normal("teacher noise", shape),
            "t_critic": rng.stratified("critic time"), "eps_critic": rng.normal("critic noise", shape),
        }  # fmt: skip
        return replace(batch, extra={**batch.extra, **extra})

    def features(self, x: torch.Tensor, batch: Batch) -> list[torch.Tensor]:
        """What the critic reads of clean pictures [B, 3, H, W]: feature positions [B, L, C]."""
        if self.encoder is not None:
            return positions(self.encoder(x))
        t = batch.extra["t_critic"]
        x_t = noised(x, batch.extra["eps_critic"], t)
        _, hidden = self.teacher(x_t, t, batch.tokens, batch.mask, self.config.layer)
        return [hidden]

    def loss(self, player: str, batch: Batch) -> Loss:
        """The student's or the critic's."""
        return self._student_loss(batch) if player == "student" else self._critic_loss(batch)

    def _generate(self, batch: Batch) -> torch.Tensor:
        x: torch.Tensor
        x, _ = self.student(batch.extra["input"], batch.extra["tau"], batch.tokens, batch.mask)
        return x

    def _student_loss(self, batch: Batch) -> Loss:
        x, t = self._generate(batch), batch.extra["t"]
        batch.extra["generated"] = x.detach()
        with torch.no_grad():
            x_t = noised(x, batch.extra["eps"], t)
            target = guided_x_0(self.teacher, x_t, t, batch.tokens, batch.mask, self.null, self.guidance)
        distilled = ((1 - t) * (x - target).square().mean((1, 2, 3))).mean()
        adversarial = -self.critic(self.features(x, batch), text_vector(batch.tokens, batch.mask)).mean()
        total = self.config.adversarial_weight * adversarial + self.config.distillation_weight * distilled
        return Loss(total, {"distillation": distilled.detach(), "adversarial": adversarial.detach()})

    def _critic_loss(self, batch: Batch) -> Loss:
        text = text_vector(batch.tokens, batch.mask)
        with torch.no_grad():
            made = batch.extra["generated"] if "generated" in batch.extra else self._generate(batch)
            real_features, made_features = self.features(batch.images, batch), self.features(made, batch)
        real, fake = self.critic(real_features, text), self.critic(made_features, text)
        total = hinge(real, fake).mean()
        told = 0.5 * ((real.mean(1) > 0).float().mean() + (fake.mean(1) < 0).float().mean())
        parts = {"hinge": total.detach(), "critic_accuracy": told}
        if self.config.r1_weight > 0:
            penalty = r1_penalty(self.critic, real_features, text).mean()
            total = total + self.config.r1_weight * penalty
            parts["r1"] = penalty.detach()
        return Loss(total, parts)

    def after_step(self, step: int) -> None:
        """Nothing to keep."""

"""Consistency distillation (Song et al. 2023, arXiv:2303.01469, alg. 2) of an x_0-predicting flow model.

f(x, t) = x_0-prediction. On the grid t_n = n/N: take x at t_n on the data path, let the teacher make one guided Euler
step to t_{n-1}, and pull f(x, t_n) towards the target network's f at the new point - or towards the point itself when
t_{n-1} = 0, which is the boundary condition. Pseudo-Huber loss per element. Guidance is distilled, so students sample
without it. A share of the batch sits at t = 1, where a one-step student is asked.
Left out: LCM's guidance embedding and skipping steps; f is exact at t = 0 only through the target.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from models.distillation.config import DistillConfig
from models.engine.objective import Batch, Loss
from models.engine.randomness import Randomness
from models.networks.prx import Denoiser
from models.pretraining.flow_matching import noised
from models.sampling.euler import euler_step

Null = tuple[torch.Tensor, torch.Tensor]


class ConsistencyDistillation:
    """The student learns to jump from anywhere on the teacher's guided path to its end."""

    def __init__(self, student: Denoiser, teacher: Denoiser, null: Null, config: DistillConfig) -> None:
        self.student, self.null, self.config = student, null, config
        self.teacher = teacher.eval().requires_grad_(False)
        self.target = copy.deepcopy(student).eval().requires_grad_(False)

    @property
    def players(self) -> Mapping[str, nn.Module]:
        """One player: the student."""
        return {"student": self.student}

    def turns(self, step: int) -> Sequence[str]:
        """The student moves in every step."""
        return ("student",)

    @torch.no_grad()
    def prepare(self, batch: Batch, rng: Randomness) -> Batch:
        """Grid times, noised pictures, the teacher's step and the target's answer there."""
        steps = self.config.teacher_steps
        index = (rng.stratified("time") * steps).long() + 1  # 1 .. N
        index = torch.where(rng.uniform("pure noise") < self.config.noise_share, torch.full_like(index, steps), index)
        t, s = index / steps, (index - 1) / steps
        x_t = noised(batch.images, rng.normal("noise", tuple(batch.images.shape[1:])), t)
        x_s = euler_step(self.teacher, x_t, t, s, batch.tokens, batch.mask, self.null, self.config.guidance)
        target, _ = self.target(x_s, s, batch.tokens, batch.mask)
        target = torch.where((index == 1).view(-1, 1, 1, 1), x_s, target)
        return replace(batch, extra={"t": t, "x_t": x_t, "target": target})

    def loss(self, player: str, batch: Batch) -> Loss:
        """sqrt(||f - target||^2 + c^2) - c per element."""
        x_0, _ = self.student(batch.extra["x_t"], batch.extra["t"], batch.tokens, batch.mask)
        c = self.config.huber
        distance = ((x_0 - batch.extra["target"]).square() + c * c).sqrt() - c
        return Loss(distance.mean(), {"consistency": distance.detach().mean()})

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Move the target network towards the student."""
        targets = [p.detach() for p in self.target.parameters()]
        students = [p.detach() for p in self.student.parameters()]
        torch._foreach_lerp_(targets, students, 1 - self.config.target_decay)

    def state(self) -> dict[str, torch.Tensor]:
        """The target network, for exact resume."""
        return dict(self.target.named_parameters())

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Inverse of `state`."""
        parameters = dict(self.target.named_parameters())
        with torch.no_grad():
            for name, value in tensors.items():
                parameters[name].copy_(value)

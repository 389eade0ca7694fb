"""Consistency models (Song et al. 2023, arXiv:2303.01469, alg. 2 and 3) and LCM (arXiv:2310.04378, alg. 1).

f(x, t) = x - t F(x, t), F the network's velocity: f(x, 0) = x to the bit, with no constants. On the grid take x at t_n
on the data path, let the teacher make one guided Euler step of `skip` grid steps to s, and pull f(x_t, t) towards the
target network's f(x_s, s). Pseudo-Huber loss per element. Guidance is distilled: one number, or (LCM) drawn from a
range and embedded. Without teacher, x_s is on the data path too (consistency training). A share of the batch sits at
t = 1, where a one-step student is asked. With adapters on the student this is LCM-LoRA (arXiv:2311.05556).
Left out: other teacher solvers (LCM's DDIM is Euler here), schedules that refine the grid.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from models.distillation.conditioning import ConditionedDenoiser
from models.distillation.config import ConsistencyConfig
from models.distillation.grid import Schedule
from models.engine.objective import Batch, Loss
from models.engine.randomness import Randomness
from models.engine.weights import put_weights
from models.networks.denoiser import T_CLAMP, Denoiser, velocity_of
from models.pretraining.flow_matching import noised
from models.sampling.euler import euler_step

Null = tuple[torch.Tensor, torch.Tensor]


def consistency_function(x_0: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, clamp: float = T_CLAMP) -> torch.Tensor:
    """f = x_t - t F from the network's x_0-prediction; it is that prediction wherever the velocity is not clamped."""
    return x_t - t.view(-1, 1, 1, 1) * velocity_of(x_0, x_t, t, clamp)


class ConsistencyDistillation:
    """The student learns to jump from anywhere on the teacher's guided path to its end."""

    def __init__(
        self, student: Denoiser | ConditionedDenoiser, teacher: Denoiser | None, null: Null, config: ConsistencyConfig,
        guidance: float = 1.0, schedule: Schedule = Schedule(),
    ) -> None:  # fmt: skip
        if config.use_teacher != (teacher is not None):
            raise ValueError(
                f"use_teacher={config.use_teacher} but the teacher is {teacher and 'given'}; make them agree"
            )
        self.student, self.null, self.config, self.guidance = student, null, config, guidance
        self.schedule = schedule
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False)
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
        steps, images = self.config.teacher_steps, batch.images
        index = (rng.stratified("time") * steps).long() + 1  # 1 .. N
        index = torch.where(rng.uniform("pure noise") < self.config.noise_share, torch.full_like(index, steps), index)
        t = self.schedule.at(index, steps, images)
        s = self.schedule.at((index - self.config.skip).clamp_min(0), steps, images)
        eps = rng.normal("noise", tuple(images.shape[1:]))
        x_t = noised(images, eps, t)
        extra = {"t": t, "x_t": x_t}
        guidance: float | torch.Tensor = self.guidance
        if self.config.guidance_range is not None:
            low, high = self.config.guidance_range
            guidance = extra["guidance"] = low + (high - low) * rng.uniform("guidance")
        if self.teacher is None:
            x_s = noised(images, eps, s)
        else:
            x_s = euler_step(self.teacher, x_t, t, s, batch.tokens, batch.mask, self.null, guidance)
        extra["target"] = self._f(self.target, x_s, s, replace(batch, extra=extra))
        return replace(batch, extra=extra)

    def loss(self, player: str, batch: Batch) -> Loss:
        """sqrt(||f - target||^2 + c^2) - c per element."""
        f, c = self._f(self.student, batch.extra["x_t"], batch.extra["t"], batch), self.config.huber
        distance = ((f - batch.extra["target"]).square() + c * c).sqrt() - c
        return Loss(distance.mean(), {"consistency": distance.detach().mean()})

    def _f(self, net: Denoiser | ConditionedDenoiser, x: torch.Tensor, t: torch.Tensor, batch: Batch) -> torch.Tensor:
        scalar = (batch.extra["guidance"],) if "guidance" in batch.extra else ()
        x_0, _ = net(x, t, batch.tokens, batch.mask, *scalar)
        return consistency_function(x_0, x, t, net.t_clamp)

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
        put_weights(self.target, tensors)

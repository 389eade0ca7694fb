"""Progressive distillation (Salimans & Ho 2022, arXiv:2202.00512, alg. 2) for flow matching, halving after halving.

On the student's grid t_N > ... > t_1 > t_0 = 0: two guided teacher Euler steps on the grid of 2N lead from x_t to x_e
at s; the one student step that lands there has the velocity v* = (x_t - x_e) / (t - s). The loss is on the velocity.
Guidance is distilled in the first halving; later ones have the student before as their teacher, without guidance. The
learning rate falls once per halving. Left out: a fresh optimizer per halving (moments are kept).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from models.distillation.config import ProgressiveConfig
from models.distillation.consistency import Null
from models.distillation.grid import Schedule
from models.engine.objective import Batch, Loss
from models.engine.randomness import Randomness
from models.networks.denoiser import Denoiser, velocity_of
from models.pretraining.flow_matching import noised
from models.sampling.euler import euler_step


class ProgressiveDistillation:
    """One student step does what two teacher steps did; then the student is the teacher of the next halving."""

    def __init__(
        self, student: Denoiser, teacher: Denoiser, null: Null, config: ProgressiveConfig, student_steps: int,
        guidance: float, total_steps: int, schedule: Schedule = Schedule(),
    ) -> None:  # fmt: skip
        self.student, self.null, self.guidance, self.schedule = student, null, guidance, schedule
        self.teacher = teacher.eval().requires_grad_(False)
        self.targets: list[int] = []  # the student's step count after each halving
        n = config.teacher_steps
        while n > student_steps:
            n //= 2
            self.targets.append(n)
        if n != student_steps or not self.targets:
            raise ValueError(
                f"progressive distillation halves: teacher_steps={config.teacher_steps} must be "
                f"student_steps={student_steps} times 2, 4, 8, ...; change one"
            )
        if total_steps % len(self.targets):
            raise ValueError(
                f"steps={total_steps} cannot be shared by {len(self.targets)} halvings {self.targets}; make it a multiple"
            )
        self.schedule_steps = total_steps // len(self.targets)
        self.finished: dict[int, dict[str, torch.Tensor]] = {}  # step count -> weights of the students on the way

    @property
    def players(self) -> Mapping[str, nn.Module]:
        """One player: the student."""
        return {"student": self.student}

    def turns(self, step: int) -> Sequence[str]:
        """The student moves in every step."""
        return ("student",)

    def halving(self, step: int) -> int:
        """Which halving a training step belongs to, from 0."""
        return min(step // self.schedule_steps, len(self.targets) - 1)

    @torch.no_grad()
    def prepare(self, batch: Batch, rng: Randomness) -> Batch:
        """A grid time per sample and the velocity that lands where two teacher steps land."""
        halving = self.halving(rng.step)
        n, guidance = self.targets[halving], self.guidance if halving == 0 else 1.0
        index = 2 * ((rng.stratified("time") * n).long() + 1)  # on the teacher's grid of 2n
        t, m, s = (self.schedule.at(index - i, 2 * n, batch.images) for i in range(3))
        x_t = noised(batch.images, rng.normal("noise", tuple(batch.images.shape[1:])), t)
        x_m = euler_step(self.teacher, x_t, t, m, batch.tokens, batch.mask, self.null, guidance)
        x_e = euler_step(self.teacher, x_m, m, s, batch.tokens, batch.mask, self.null, guidance)
        return replace(batch, extra={"t": t, "x_t": x_t, "velocity": (x_t - x_e) / (t - s).view(-1, 1, 1, 1)})

    def loss(self, player: str, batch: Batch) -> Loss:
        """||v_student - v*||^2."""
        t, x_t = batch.extra["t"], batch.extra["x_t"]
        x_0, _ = self.student(x_t, t, batch.tokens, batch.mask)
        error = (velocity_of(x_0, x_t, t, self.student.t_clamp) - batch.extra["velocity"]).square().mean()
        return Loss(error, {"progressive": error.detach()})

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """At the end of a halving the student becomes the teacher."""
        halving = self.halving(step)
        if halving == self.halving(step + 1):
            return
        weights = dict(self.student.named_parameters())
        for name, parameter in self.teacher.named_parameters():
            parameter.copy_(weights[name])
        self.finished[self.targets[halving]] = {name: p.detach().clone() for name, p in weights.items()}

    def state(self) -> dict[str, torch.Tensor]:
        """The teacher and the students on the way, for exact resume."""
        tensors: dict[str, torch.Tensor] = {f"teacher/{name}": p for name, p in self.teacher.named_parameters()}
        for n, weights in self.finished.items():
            tensors.update({f"{n}/{name}": p for name, p in weights.items()})
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Inverse of `state`."""
        teacher = dict(self.teacher.named_parameters())
        for key, value in tensors.items():
            owner, name = key.split("/", 1)
            if owner == "teacher":
                teacher[name].copy_(value)
            else:
                self.finished.setdefault(int(owner), {})[name] = value

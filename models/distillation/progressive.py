"""Progressive distillation (Salimans & Ho 2022, arXiv:2202.00512, alg. 2) for flow matching, one halving.

On the student's grid t in {1, ..., 1/N}: two guided teacher Euler steps lead from x_t to x_e at s = t - 1/N; the one
student step that lands there has the velocity v* = (x_t - x_e) / (t - s). The loss is on the velocity. Guidance is
distilled in the same halving, so the student samples without it. Left out: chains of halvings (run stages in a row).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from models.distillation.config import DistillConfig
from models.distillation.consistency import Null
from models.engine.objective import Batch, Loss
from models.engine.randomness import Randomness
from models.networks.prx import Denoiser, velocity_of
from models.pretraining.flow_matching import noised
from models.sampling.euler import euler_step


class ProgressiveDistillation:
    """One student step does what two teacher steps did."""

    def __init__(self, student: Denoiser, teacher: Denoiser, null: Null, config: DistillConfig) -> None:
        if config.teacher_steps != 2 * config.student_steps:
            raise ValueError(
                f"progressive distillation halves: teacher_steps={config.teacher_steps} must be twice "
                f"student_steps={config.student_steps}; use a chain of stages for more"
            )
        self.student, self.null, self.config = student, null, config
        self.teacher = teacher.eval().requires_grad_(False)

    @property
    def players(self) -> Mapping[str, nn.Module]:
        """One player: the student."""
        return {"student": self.student}

    def turns(self, step: int) -> Sequence[str]:
        """The student moves in every step."""
        return ("student",)

    @torch.no_grad()
    def prepare(self, batch: Batch, rng: Randomness) -> Batch:
        """A grid time per sample and the velocity that lands where two teacher steps land."""
        n = self.config.student_steps
        index = (rng.stratified("time") * n).long() + 1
        t, m, s = index / n, (index - 0.5) / n, (index - 1) / n
        x_t = noised(batch.images, rng.normal("noise", tuple(batch.images.shape[1:])), t)
        x_m = euler_step(self.teacher, x_t, t, m, batch.tokens, batch.mask, self.null, self.config.guidance)
        x_e = euler_step(self.teacher, x_m, m, s, batch.tokens, batch.mask, self.null, self.config.guidance)
        return replace(batch, extra={"t": t, "x_t": x_t, "velocity": (x_t - x_e) * n})

    def loss(self, player: str, batch: Batch) -> Loss:
        """||v_student - v*||^2."""
        t, x_t = batch.extra["t"], batch.extra["x_t"]
        x_0, _ = self.student(x_t, t, batch.tokens, batch.mask)
        error = (velocity_of(x_0, x_t, t) - batch.extra["velocity"]).square().mean()
        return Loss(error, {"progressive": error.detach()})

    def after_step(self, step: int) -> None:
        """Nothing to keep."""

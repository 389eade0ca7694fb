"""sCM (Lu & Song 2024, arXiv:2410.11081, alg. 1) on a flow-matching model through TrigFlow (SANA-Sprint, sec. 3.1).

TrigFlow: x = cos(a) x_0 + sin(a) z with z ~ N(0, 1), a from 0 (data) to pi/2. The same point in flow matching is
x_t = x / (cos a + sin a) at t = sin a / (cos a + sin a); no retraining. With F = dx/da of the student,
f = cos(a) x - sin(a) F, and the tangent cos(a) df/da is
    g = -cos^2(a) (F - dx/da) - r cos(a) sin(a) (x + dF/da),      dF/da by a forward-mode derivative along the teacher,
r phased in, g <- g / (||g|| + 0.1), loss ||F - sg(F) - g||^2. Left out: the learnt weighting e^-u(a); prior weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.distillation.config import ScmConfig
from models.distillation.consistency import Null
from models.engine.objective import Batch, Loss
from models.engine.randomness import Randomness
from models.networks.denoiser import Denoiser
from models.sampling.euler import guided_x_0

LEAST_ANGLE = 0.05
TANGENT_SCALE = 0.1


def to_trig(x_t: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, angle) of TrigFlow from a flow-matching point x_t [B, C, H, W] at t [B]."""
    scale = (t * t + (1 - t) * (1 - t)).sqrt()
    return x_t / scale.view(-1, 1, 1, 1), torch.atan2(t, 1 - t)


def to_flow(x: torch.Tensor, angle: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse of `to_trig`."""
    total = angle.cos() + angle.sin()
    return x / total.view(-1, 1, 1, 1), angle.sin() / total


def trig_velocity(x_0: torch.Tensor, x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """dx/da = cos(a) z - sin(a) x_0 where z follows from x and the x_0-prediction."""
    a = angle.view(-1, 1, 1, 1)
    z = (x - a.cos() * x_0) / a.sin()
    return a.cos() * z - a.sin() * x_0


def tangent(
    velocity: torch.Tensor,
    field: torch.Tensor,
    derivative: torch.Tensor,
    x: torch.Tensor,
    angle: torch.Tensor,
    r: float,
) -> torch.Tensor:
    """g of the student's `field` F, its `derivative` dF/da along the path and the path's `velocity` dx/da."""
    a = angle.view(-1, 1, 1, 1)
    return -a.cos().square() * (field - velocity) - r * a.cos() * a.sin() * (x + derivative)


class ContinuousConsistency:
    """Consistency without a grid."""

    def __init__(
        self, student: Denoiser, teacher: Denoiser, null: Null, config: ScmConfig, guidance: float, total_steps: int
    ) -> None:
        self.student, self.null, self.config, self.guidance = student, null, config, guidance
        self.teacher = teacher.eval().requires_grad_(False)
        self.warmup_steps = max(1, round(config.warmup * total_steps))

    @property
    def players(self) -> Mapping[str, nn.Module]:
        """One player: the student."""
        return {"student": self.student}

    def turns(self, step: int) -> Sequence[str]:
        """The student moves in every step."""
        return ("student",)

    def field(self, x: torch.Tensor, angle: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The student's F at a TrigFlow point."""
        x_t, t = to_flow(x, angle)
        x_0, _ = self.student(x_t, t, batch.tokens, batch.mask)
        return trig_velocity(x_0, x, angle)

    @torch.no_grad()
    def prepare(self, batch: Batch, rng: Randomness) -> Batch:
        """Angles, points, and the target F - g of the student before this step."""
        z = torch.special.ndtri(rng.stratified("time").double().clamp(1e-6, 1 - 1e-6)).float()
        angle = torch.atan(torch.exp(self.config.mean + self.config.std * z)).clamp_min(LEAST_ANGLE)
        noise = rng.uniform("pure noise") < self.config.noise_share
        angle = torch.where(noise, torch.full_like(angle, math.pi / 2), angle)
        a = angle.view(-1, 1, 1, 1)
        x = a.cos() * batch.images + a.sin() * rng.normal("noise", tuple(batch.images.shape[1:]))
        x_t, t = to_flow(x, angle)
        x_0 = guided_x_0(self.teacher, x_t, t, batch.tokens, batch.mask, self.null, self.guidance)
        velocity = trig_velocity(x_0, x, angle)
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward-mode derivative
            field, derivative = jvp(  # type: ignore[misc]
                lambda point, at: self.field(point, at, batch), (x, angle), (velocity, torch.ones_like(angle))
            )
        g = tangent(velocity, field, derivative, x, angle, min(1.0, rng.step / self.warmup_steps))
        g = g / (g.square().mean((1, 2, 3), keepdim=True).sqrt() + TANGENT_SCALE)
        return replace(batch, extra={"x": x, "angle": angle, "target": field + g})

    def loss(self, player: str, batch: Batch) -> Loss:
        """||F - (F + g of before)||^2."""
        error = (self.field(batch.extra["x"], batch.extra["angle"], batch) - batch.extra["target"]).square().mean()
        return Loss(error, {"scm": error.detach()})

    def after_step(self, step: int) -> None:
        """Nothing to keep."""

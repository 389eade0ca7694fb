"""InstaFlow (Liu et al. 2023, arXiv:2309.06380): reflow on the teacher's own pairs, then distil into few steps.

A pair is (noise z, picture x^ = ODE(teacher, z)). Reflow: t uniform, x_t = (1-t) x^ + t z, loss ||v(x_t, t) - (z - x^)||^2;
the new flow is straighter. Distillation: only at the student's own times (t = 1 for one step), where the straight path
ends in x^; MSE first, then MSE plus a perceptual distance. The paper's papers run time the other way.
Left out: LPIPS alone (on 32 px its features ignore flat colour, so MSE stays).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from models.distillation.config import InstaFlowConfig
from models.distillation.grid import Schedule
from models.distillation.perceptual import Distance
from models.engine.objective import Batch, Loss
from models.engine.randomness import Randomness
from models.networks.denoiser import Denoiser, velocity_of
from models.pretraining.flow_matching import noised, velocity_error


class InstaFlow:
    """A batch holds teacher pictures in `images` and the noise each came from in `extra["noise"]`."""

    def __init__(
        self, student: Denoiser, config: InstaFlowConfig, student_steps: int, total_steps: int,
        perceptual: Distance | None, schedule: Schedule = Schedule(),
    ) -> None:  # fmt: skip
        if config.perceptual_share > 0 and perceptual is None:
            raise ValueError(
                f"perceptual_share={config.perceptual_share} needs a perceptual distance; pass one or set 0"
            )
        self.student, self.perceptual, self.schedule = student, perceptual, schedule
        self.student_steps = student_steps
        self.reflow_until = round(config.reflow_share * total_steps)
        self.perceptual_from = total_steps - round(config.perceptual_share * total_steps)

    @property
    def players(self) -> Mapping[str, nn.Module]:
        """One player: the student."""
        return {"student": self.student}

    def turns(self, step: int) -> Sequence[str]:
        """The student moves in every step."""
        return ("student",)

    @torch.no_grad()
    def prepare(self, batch: Batch, rng: Randomness) -> Batch:
        """The point on each pair's straight path: anywhere (reflow), then only where the student is asked."""
        t = rng.stratified("time")
        if rng.step >= self.reflow_until:
            t = self.schedule.at((t * self.student_steps).long() + 1, self.student_steps, batch.images)
        perceptual = torch.tensor(rng.step >= self.perceptual_from)
        x_t = noised(batch.images, batch.extra["noise"], t)
        return replace(batch, extra={**batch.extra, "t": t, "x_t": x_t, "perceptual": perceptual})

    def loss(self, player: str, batch: Batch) -> Loss:
        """||v - (z - x^)||^2, plus the perceptual distance of the end points at the end of the run."""
        t, x_t = batch.extra["t"], batch.extra["x_t"]
        x_0, _ = self.student(x_t, t, batch.tokens, batch.mask)
        error = velocity_error(x_0, batch.images, t, self.student.t_clamp)
        parts = {"flow": error.detach().mean()}
        if self.perceptual is not None and bool(batch.extra["perceptual"]):
            distance = self.perceptual(x_0, batch.images)
            parts["perceptual"] = distance.detach().mean()
            error = error + distance
        return Loss(error.mean(), parts)

    def after_step(self, step: int) -> None:
        """Nothing to keep."""


@torch.no_grad()
def straightness(net: Denoiser, batch: Batch, rng: Randomness) -> float:
    """S = E ||(z - x^) - v(x_t, t)||^2 over t uniform (Liu et al. 2022, arXiv:2209.03003, eq. 8); 0 for straight flows."""
    t = rng.stratified("straightness")
    x_t = noised(batch.images, batch.extra["noise"], t)
    x_0, _ = net(x_t, t, batch.tokens, batch.mask)
    error = batch.extra["noise"] - batch.images - velocity_of(x_0, x_t, t, net.t_clamp)
    return float(error.square().mean())

"""MeanFlow (Geng et al. 2025, arXiv:2505.13447, eq. 6 and alg. 1), distilled: the data velocity is the teacher's.

u(x_t, t, r) is the average velocity on [r, t]: x_r = x_t - (t - r) u. The MeanFlow identity gives the target
    u* = sg( v - (t - r) du/dt ),   du/dt along (v, 1, 0) in (x, t, r) by a forward-mode derivative,
v the teacher's guided velocity. With `split` = d the derivative is replaced by what it is the limit of (d -> 0),
    (t - r) u*(x_t, t, r) = d v + (t - r - d) u(x_t - d v, t - d, r),
a contraction: networks whose time embedding turns at 1000 rad per unit, as PRX's does, have derivatives that run away.
The network is told t and the interval t - r; for an even grid the interval is one
number, so the students exported for N steps are stock transformers. A share of the batch has r = t (plain flow
matching), a share the whole interval 1 to 0, where a one-step student is asked. Adaptive weight (eq. 22).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.distillation.conditioning import ConditionedDenoiser
from models.distillation.config import MeanFlowConfig
from models.distillation.consistency import Null
from models.engine.objective import Batch, Loss
from models.engine.randomness import Randomness
from models.networks.denoiser import Denoiser, velocity_of
from models.pretraining.flow_matching import noised
from models.sampling.euler import guided_x_0

FLOOR = 0.01


class MeanFlow:
    """The student learns the average velocity of any interval of the teacher's guided flow."""

    def __init__(
        self, student: ConditionedDenoiser, teacher: Denoiser, null: Null, config: MeanFlowConfig, guidance: float
    ) -> None:
        self.student, self.null, self.config, self.guidance = student, null, config, guidance
        self.teacher = teacher.eval().requires_grad_(False)

    @property
    def players(self) -> Mapping[str, nn.Module]:
        """One player: the student."""
        return {"student": self.student}

    def turns(self, step: int) -> Sequence[str]:
        """The student moves in every step."""
        return ("student",)

    def average_velocity(self, x: torch.Tensor, t: torch.Tensor, r: torch.Tensor, batch: Batch) -> torch.Tensor:
        """u(x, t, r) of the student."""
        x_0, _ = self.student(x, t, batch.tokens, batch.mask, t - r)
        return velocity_of(x_0, x, t, self.student.t_clamp)

    @torch.no_grad()
    def prepare(self, batch: Batch, rng: Randomness) -> Batch:
        """Intervals, noised pictures, and u*."""
        t, r = (times.to(batch.images.dtype) for times in self.intervals(rng))
        x_t = noised(batch.images, rng.normal("noise", tuple(batch.images.shape[1:])), t)
        x_0 = guided_x_0(self.teacher, x_t, t, batch.tokens, batch.mask, self.null, self.guidance)
        v = velocity_of(x_0, x_t, t, self.teacher.t_clamp)
        target = self._derived(x_t, t, r, v, batch) if self.config.split is None else self._split(x_t, t, r, v, batch)
        return replace(batch, extra={"t": t, "r": r, "x_t": x_t, "target": target})

    def _derived(
        self, x_t: torch.Tensor, t: torch.Tensor, r: torch.Tensor, v: torch.Tensor, batch: Batch
    ) -> torch.Tensor:
        """v - (t - r) du/dt."""
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward-mode derivative
            _, derivative = jvp(  # type: ignore[misc]
                lambda x, at, start: self.average_velocity(x, at, start, batch),
                (x_t, t, r),
                (v, torch.ones_like(t), torch.zeros_like(r)),
            )
        target: torch.Tensor = v - (t - r).view(-1, 1, 1, 1) * derivative
        return target

    def _split(
        self, x_t: torch.Tensor, t: torch.Tensor, r: torch.Tensor, v: torch.Tensor, batch: Batch
    ) -> torch.Tensor:
        """(d v + (t - r - d) u(x_{t-d}, t - d, r)) / (t - r); v where the interval is no longer than d."""
        step = torch.minimum(torch.full_like(t, self.config.split or 0.0), t - r)
        later = self.average_velocity(x_t - step.view(-1, 1, 1, 1) * v, t - step, r, batch)
        share = (step / (t - r).clamp_min(1e-6)).view(-1, 1, 1, 1)
        return torch.where((share > 0) & (share < 1), share * v + (1 - share) * later, v)

    def intervals(self, rng: Randomness) -> tuple[torch.Tensor, torch.Tensor]:
        """(t, r) [B] with 1 >= t >= r >= 0."""
        u = torch.stack([rng.stratified("first time"), rng.stratified("second time")]).double().clamp(1e-6, 1 - 1e-6)
        times = torch.sigmoid(self.config.mean + self.config.std * torch.special.ndtri(u)).float()
        t, r = times.amax(0), times.amin(0)
        kind, config = rng.stratified("interval"), self.config
        whole = kind >= 1 - config.whole_share
        t, r = torch.where(whole, torch.ones_like(t), t), torch.where(whole, torch.zeros_like(r), r)
        return t, torch.where(kind < config.instant_share, t, r)

    def loss(self, player: str, batch: Batch) -> Loss:
        """||u - u*||^2 over its own detached power, per sample."""
        u = self.average_velocity(batch.extra["x_t"], batch.extra["t"], batch.extra["r"], batch)
        error = (u - batch.extra["target"]).square().mean((1, 2, 3))
        weighted = error / (error.detach() + FLOOR) ** self.config.power
        return Loss(weighted.mean(), {"meanflow": error.detach().mean()})

    def after_step(self, step: int) -> None:
        """Nothing to keep."""

"""Flow matching (Lipman et al. 2022, arXiv:2210.02747) on straight paths: x_t = (1-t) x_0 + t eps, v = eps - x_0.

The network predicts x_0 (JiT, arXiv:2511.13720); the loss is on the velocity: the x_0 error divided by max(t, 0.05),
the very clamp the exported pipeline uses. A network that predicts v is asked for its x_0 and has no clamp to speak of, so
its loss is ||v_hat - v||^2. Other predictions and weights are in baselines.py. Continuous t, no 1000-entry table; density,
shift and loss weight are separate options. Alignment terms are passed in (repa.py, encoder_free.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from models.engine.objective import Batch, Loss
from models.engine.randomness import Randomness
from models.networks.denoiser import T_CLAMP, Denoiser
from models.networks.routing import Route
from models.pretraining import baselines
from models.pretraining.config import ObjectiveConfig, TimestepConfig, TreadConfig
from models.pretraining.curriculum import Phase, phase_at
from models.pretraining.repa import Alignment
from models.pretraining.timesteps import draw_times


class FlowMatching:
    """The objective of pre-training, continued training, SFT and DreamBooth."""

    pure_loss = True
    shardable = True

    def __init__(
        self, denoiser: Denoiser, timesteps: TimestepConfig, repa: Alignment | None = None,
        objective: ObjectiveConfig = ObjectiveConfig(), phases: Sequence[Phase] = (), bins: int = 0,
    ) -> None:  # fmt: skip
        if objective.kind != "x_0" and denoiser.prediction != "x_0":
            raise ValueError(
                f"objective.kind={objective.kind} needs a network whose answer is taken as it is, but this family's means "
                f"{denoiser.prediction}; use x_0, which trains what the family predicts, or PRX in pixels"
            )
        self.denoiser, self.timesteps, self.repa, self.objective = denoiser, timesteps, repa, objective
        self.phases, self.bins = phases or (Phase(timesteps),), bins
        self.model = nn.ModuleDict({"denoiser": denoiser})
        if repa is not None and repa.projector is not None:
            self.model["projector"] = repa.projector
        self.step = 0

    @property
    def players(self) -> Mapping[str, nn.Module]:
        """One player: the denoiser (with REPA's projector)."""
        return {"denoiser": self.model}

    def turns(self, step: int) -> Sequence[str]:
        """The denoiser moves in every step."""
        self.step = step
        return ("denoiser",)

    def prepare(self, batch: Batch, rng: Randomness) -> Batch:
        """Draw t and eps, mix x_t, choose the tokens that skip blocks, ask the alignment for its targets."""
        _, _, height, width = batch.images.shape
        tokens = (height * width) // self.denoiser.patch_size**2
        phase = phase_at(self.phases, rng.step)
        t = draw_times(rng, tokens, phase.timesteps)
        eps = rng.normal("noise", tuple(batch.images.shape[1:]))
        batch = replace(batch, extra={**batch.extra, "t": t, "eps": eps, "x_t": noised(batch.images, eps, t)})
        if phase.tread is not None:
            batch.extra["keep"] = kept_tokens(rng, tokens, phase.tread)
        align = self._alignment(rng.step)
        return batch if align is None else align.prepare(batch, rng)

    def loss(self, player: str, batch: Batch) -> Loss:
        """Mean squared error of the prediction (weighted per sample), plus the alignment while it is active."""
        t, x_t = batch.extra["t"], batch.extra["x_t"]
        align, tread = self._alignment(self.step), phase_at(self.phases, self.step).tread
        route = None if tread is None else Route(batch.extra["keep"], tread.first, tread.last)
        layer = None if align is None else align.config.layer
        scale = baselines.input_scale(t, self.objective)
        given = x_t if scale is None else x_t * baselines.column(scale)
        output, hidden = self.denoiser(given, t, batch.tokens, batch.mask, layer, route=route)
        error = self.error(output, batch)
        parts = {"flow": error.detach().mean()}
        total = error
        if align is not None and hidden is not None:
            around = route if route is not None and route.covers(align.config.layer) else None
            term = align.term(hidden, batch, around)
            parts["repa"] = term.detach().mean()
            total = total + term
        if batch.weight is not None:
            total = total * batch.weight
        return Loss(total.mean(), parts, self._by_time(error.detach(), t))

    def error(self, output: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Loss of each sample [B] of what the network made of x_t [B, C, H, W]."""
        eps, t, clamp = batch.extra["eps"], batch.extra["t"], self.denoiser.t_clamp
        return baselines.error(output, batch.images, eps, t, self.objective, clamp)

    def _alignment(self, step: int) -> Alignment | None:
        if self.repa is None or not self.repa.active(step) or not phase_at(self.phases, step).repa:
            return None
        return self.repa

    def _by_time(self, error: torch.Tensor, t: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Sum and count of the errors in each part of [0, 1]."""
        places = (t * self.bins).long().clamp_max(self.bins - 1)
        return {
            f"flow t={i / self.bins:g}-{(i + 1) / self.bins:g}": (error[places == i].sum(), (places == i).sum())
            for i in range(self.bins)
        }

    def after_step(self, step: int) -> None:
        """Let the alignment follow the moved weights while it is active."""
        if (align := self._alignment(step)) is not None:
            align.after_step(self.denoiser)

    def state(self) -> dict[str, torch.Tensor]:
        """What the alignment remembers."""
        return {} if self.repa is None else self.repa.state()

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Inverse of `state`."""
        if self.repa is not None:
            self.repa.load_state(tensors)


def kept_tokens(rng: Randomness, tokens: int, config: TreadConfig) -> torch.Tensor:
    """Indices [B, K], ascending, of the tokens that pass the routed blocks; at least one."""
    count = max(1, round(tokens * (1 - config.share)))
    return rng.uniform("routing", (tokens,)).argsort(1)[:, :count].sort(1).values


def noised(x_0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """x_t = (1 - t) x_0 + t eps for t [B] and pictures [B, C, H, W]."""
    t = t.view(-1, 1, 1, 1)
    return (1 - t) * x_0 + t * eps


def velocity_error(
    predicted: torch.Tensor, x_0: torch.Tensor, t: torch.Tensor, clamp: float = T_CLAMP
) -> torch.Tensor:  # fmt: skip
    """Per-sample mean squared velocity error [B]: ||(x_0_hat - x_0) / max(t, clamp)||^2, the network's `t_clamp`."""
    return ((predicted - x_0) / t.clamp_min(clamp).view(-1, 1, 1, 1)).square().mean((1, 2, 3))

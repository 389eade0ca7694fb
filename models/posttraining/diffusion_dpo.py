"""Diffusion-DPO (Wallace et al. 2023, arXiv:2311.12908, eq. 14) for flow matching.

e(x) = ||v(x_t) - (eps - x_0)||^2 with the same eps and t for both pictures of a pair;
margin m = [e(w) - e_ref(w)] - [e(l) - e_ref(l)]; loss = -log sigmoid(-beta/2 m), ln 2 at the start where m = 0.
beta multiplies per-sample means here, so the config gives it per element: beta_mean = beta_per_element * 3HW.
An anchor (flow matching on the preferred picture, weighted in units of beta/2, the largest weight the preference gives
an error) keeps the winner's likelihood from falling with the loser's, and means the same for any beta and picture size;
`winners_fell` is the alarm for when it falls all the same.
Left out: per-timestep weights, automatic beta.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from models.engine.objective import Batch, Loss
from models.engine.precision import autocast
from models.engine.randomness import Randomness
from models.networks.denoiser import Denoiser
from models.posttraining.config import DpoConfig
from models.pretraining.flow_matching import noised, velocity_error
from models.pretraining.timesteps import draw_times

FELL_ROWS = 3  # of the log, one after the other
FELL_ERRORS = 2.0  # standard errors of a share above a half


class DiffusionDpo:
    """Preference tuning. A batch holds winners in `images` and losers in `extra["loser"]`."""

    def __init__(self, denoiser: Denoiser, reference: Denoiser, config: DpoConfig) -> None:
        self.denoiser, self.config = denoiser, config
        self.reference = reference.eval().requires_grad_(False)

    @property
    def players(self) -> Mapping[str, nn.Module]:
        """One player: the denoiser."""
        return {"denoiser": self.denoiser}

    def turns(self, step: int) -> Sequence[str]:
        """The denoiser moves in every step."""
        return ("denoiser",)

    def prepare(self, batch: Batch, rng: Randomness) -> Batch:
        """Same t and eps for winner and loser; the reference's errors."""
        _, _, h, w = batch.images.shape
        tokens = h * w // self.denoiser.patch_size**2
        t = draw_times(rng, tokens, self.config.timesteps)
        eps = rng.normal("noise", tuple(batch.images.shape[1:]))
        extra = dict(batch.extra, t=t, eps=eps)
        with (
            torch.no_grad(),
            autocast(batch.images.device, self.config.train.precision),
        ):  # or m would not be 0 at first
            extra["reference"] = self._errors(self.reference, replace(batch, extra=extra))
        return replace(batch, extra=extra)

    def loss(self, player: str, batch: Batch) -> Loss:
        """-log sigmoid(-beta/2 m) plus the anchor; parts have what `winners_fell` reads."""
        winner, loser = self._errors(self.denoiser, batch).chunk(2)
        winner_ref, loser_ref = batch.extra["reference"].chunk(2)
        margin = (winner - winner_ref) - (loser - loser_ref)
        pull = self.config.beta_per_element * batch.images[0].numel() / 2
        preference = -F.logsigmoid(-pull * margin)
        wins = (margin < 0).float() + 0.5 * (margin == 0).float()
        change = (winner - winner_ref).detach()
        parts = {
            "dpo": preference.detach().mean(), "implicit_accuracy": wins.mean(), "winner_change": change.mean(),
            "winners_worse": (change > 0).float().mean(), "loser_change": (loser - loser_ref).detach().mean(),
        }  # fmt: skip
        return Loss((preference + self.config.anchor * pull * winner).mean(), parts)

    def after_step(self, step: int) -> None:
        """Nothing to keep."""

    def _errors(self, net: Denoiser, batch: Batch) -> torch.Tensor:
        """Velocity errors [2B], winners first."""
        pictures = torch.cat([batch.images, batch.extra["loser"]])
        t, eps = batch.extra["t"].repeat(2), batch.extra["eps"].repeat(2, 1, 1, 1)
        x_0, _ = net(noised(pictures, eps, t), t, batch.tokens.repeat(2, 1, 1), batch.mask.repeat(2, 1))
        return velocity_error(x_0, pictures, t, net.t_clamp)


def winners_fell(rows: Iterable[Mapping[str, float]], pairs: int) -> int | None:
    """The step of the log by which winners had become less likely, or None: an alarm, since DPO may lower both.

    In FELL_ROWS rows running their mean error lies above the reference's, and more of the `pairs` behind a row than a
    half by FELL_ERRORS standard errors are worse. (The mean alone is that of the few pairs with the smallest t.)
    """
    running, limit = 0, 0.5 + FELL_ERRORS * 0.5 / pairs**0.5
    for row in rows:
        running = running + 1 if row["winner_change"] > 0 and row["winners_worse"] > limit else 0
        if running == FELL_ROWS:
            return int(row["step"])
    return None

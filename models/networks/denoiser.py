"""What every family's network is to the techniques: x_t, t, text -> x_0, whatever it predicts itself.

t = 0 data, t = 1 noise, x_t = (1 - t) x_0 + t eps, velocity v = eps - x_0. A network predicts x_0 or v; `forward` answers
with x_0, so that one loss, sampler or technique serves all families, and `as_velocity` is v as the family's stock pipeline
gets it, so that our pixels are the pipeline's. Shapes: B pictures, C x H x W pixels or latents, T text tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from models.networks.routing import Route

T_CLAMP = 0.05  # PRXPixelPipeline divides by max(t, 0.05) when it turns x_0 into a velocity
T_SMALLEST = 1e-3  # below it a velocity's x_0 is exact to rounding anyway; keeps 0 / 0 out of the loss

Prediction = Literal["x_0", "velocity"]


class Denoiser(nn.Module):
    """A stock diffusers network as `transformer`, asked in one way; families say how in `predict`."""

    text_mean: torch.Tensor
    text_std: torch.Tensor

    def __init__(
        self, network: Any = None, prediction: Prediction = "x_0", text_mean: torch.Tensor | None = None,
        text_std: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.transformer: Any = network
        self.prediction: Prediction = prediction
        self.register_buffer("text_mean", torch.zeros(1) if text_mean is None else text_mean.float())
        self.register_buffer("text_std", torch.ones(1) if text_std is None else text_std.float())

    def predict(
        self, x_t: torch.Tensor, t: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor,
        hidden_layer: int | None = None, condition: torch.Tensor | None = None, route: Route | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """What the network predicts [B, C, H, W] and, if asked for, the tokens [B, L, W] after that block (0-based).

        `condition` [B, W] is added to the time embedding; with a `route` some tokens skip some blocks (training only).
        """
        raise NotImplementedError

    def forward(
        self, x_t: torch.Tensor, t: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor,
        hidden_layer: int | None = None, condition: torch.Tensor | None = None, route: Route | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """As `predict`, but x_0 [B, C, H, W] whatever the network predicts."""
        prediction, hidden = self.predict(x_t, t, tokens, mask, hidden_layer, condition, route)
        return self.as_x_0(prediction, x_t, t), hidden

    def as_x_0(self, prediction: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The clean end of the path through x_t, from a prediction."""
        match self.prediction:
            case "x_0":
                return prediction
            case "velocity":
                return x_t - t.view(-1, 1, 1, 1) * prediction

    def as_velocity(self, prediction: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """eps - x_0 of the path through x_t, from a prediction."""
        match self.prediction:
            case "x_0":
                return velocity_of(prediction, x_t, t, self.t_clamp)
            case "velocity":
                return prediction

    @property
    def t_clamp(self) -> float:
        """The least time by which an x_0 error is divided to make it a velocity error."""
        return T_CLAMP if self.prediction == "x_0" else T_SMALLEST

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.text_mean.device

    @property
    def patch_size(self) -> int:
        """Side of a token in pixels or latents."""
        return int(self.transformer.config.patch_size)

    @property
    def stride(self) -> int:
        """Sides of what is denoised must be multiples of this."""
        return self.patch_size

    @property
    def longest_side(self) -> int | None:
        """Longest side of what is denoised that has positions; None: any."""
        return None

    @property
    def channels(self) -> int:
        """Channels of what is denoised."""
        return int(self.transformer.config.in_channels)

    @property
    def width(self) -> int:
        """Channels of a hidden token."""
        raise NotImplementedError

    @property
    def depth(self) -> int:
        """Number of blocks."""
        raise NotImplementedError

    @property
    def time_bias(self) -> torch.Tensor:
        """Bias [W] of the last layer of the time embedding, where a constant condition belongs."""
        raise NotImplementedError

    def around(self, network: Any) -> Denoiser:
        """The same denoiser with another network of its class inside."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Write the network as stock diffusers loads it."""
        raise NotImplementedError


def velocity_of(x_0: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, clamp: float = T_CLAMP) -> torch.Tensor:
    """eps - x_0 of the straight path through x_t that ends in x_0; t no less than `clamp` (the network's `t_clamp`)."""
    return (x_t - x_0) / t.clamp_min(clamp).view(-1, 1, 1, 1)

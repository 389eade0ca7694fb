"""diffusers' UNet2DConditionModel under the flow-matching objective: it predicts the velocity of pixels or latents.

Text features come in raw and are standardised here; the network has no layer of its own to fold that into, so the two
vectors are saved beside it. Masked text tokens get no attention. No stock pipeline samples a flow-matching UNet: what is
exported is the module, with the few stock lines that sample it. Left out: REPA taps, a UNet has no one token grid.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from models.networks.config import UNetConfig
from models.networks.denoiser import Denoiser
from models.networks.prx import forget_paths
from models.networks.routing import Route

TIMES = 1000.0  # the network is told t * 1000
STATISTICS = "text_statistics.safetensors"


class UNetDenoiser(Denoiser):
    """The stock UNet; `text_mean` and `text_std` standardise the text."""

    def predict(
        self, x_t: torch.Tensor, t: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor,
        hidden_layer: int | None = None, condition: torch.Tensor | None = None, route: Route | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """The velocity; neither a hidden layer nor a condition nor a route can be asked for."""
        if hidden_layer is not None or condition is not None or route is not None:
            raise ValueError(
                "a UNet has no token grid to align or to route and takes no second scalar; set repa and tread to null, "
                "or use PRX or SD3"
            )
        text = (tokens - self.text_mean) / self.text_std
        output: torch.Tensor = self.transformer(
            x_t, t * TIMES, encoder_hidden_states=text, encoder_attention_mask=mask, return_dict=False
        )[0]
        return output, None

    @property
    def patch_size(self) -> int:
        """One: every pixel or latent counts as a token of the time shift."""
        return 1

    @property
    def stride(self) -> int:
        """Sides must be multiples of this: each level but the last halves them."""
        return int(2 ** (len(self.transformer.config.block_out_channels) - 1))

    @property
    def width(self) -> int:
        """Channels of the time embedding."""
        return int(self.transformer.config.block_out_channels[0]) * 4

    @property
    def depth(self) -> int:
        """No block can be tapped."""
        return 0

    def around(self, network: Any) -> UNetDenoiser:
        """The same standardisation around another UNet."""
        return UNetDenoiser(network, "velocity", self.text_mean, self.text_std)

    def save(self, folder: Path) -> None:
        """Write the stock module's folder and the text standardisation."""
        self.transformer.save_pretrained(folder)
        save_file({"mean": self.text_mean.clone(), "std": self.text_std.clone()}, folder / STATISTICS)
        forget_paths(folder)


def build(
    config: UNetConfig, text_mean: torch.Tensor, text_std: torch.Tensor, channels: int, seed: int
) -> UNetDenoiser:
    """A fresh UNet; its output layer starts at zero."""
    levels = len(config.channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = UNet2DConditionModel(
            in_channels=channels, out_channels=channels, block_out_channels=config.channels, layers_per_block=config.layers,
            down_block_types=("CrossAttnDownBlock2D",) * levels, up_block_types=("CrossAttnUpBlock2D",) * levels,
            cross_attention_dim=config.text_dim, attention_head_dim=config.head_dim, norm_num_groups=8,
        )  # fmt: skip
    torch.nn.init.zeros_(network.conv_out.weight)
    torch.nn.init.zeros_(network.conv_out.bias)
    return UNetDenoiser(network, "velocity", text_mean, text_std)


def load(folder: Path) -> UNetDenoiser:
    """A saved UNet with its standardisation, safetensors only."""
    network = UNet2DConditionModel.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False
    )
    text = load_file(folder / STATISTICS)
    return UNetDenoiser(network, "velocity", text["mean"], text["std"])

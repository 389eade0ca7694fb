"""Stable Diffusion 3 (arXiv:2403.03206): diffusers' SD3Transformer2DModel in a VAE's latents, predicting the velocity.

The text is two CLIP encoders and a T5, any of which a pipeline may lack in diffusers' way; their tokens and the pooled
vector travel as one tensor [B, P + T, D]: the pooled vector [B, E] fills the first P = ceil(E / D) rows, so that batches,
caches and guidance treat text of every family alike. No token is masked, as in the stock pipeline.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch.nn import functional as F

from models.networks.config import Sd3Config
from models.networks.denoiser import Denoiser
from models.networks.prx import forget_paths
from models.networks.routing import Route

TIMES = 1000.0  # the network is told t * 1000


class Sd3Denoiser(Denoiser):
    """Text features come packed; no standardisation."""

    def __init__(self, network: SD3Transformer2DModel) -> None:
        dim = int(network.config.joint_attention_dim)
        super().__init__(network, "velocity", torch.zeros(dim), torch.ones(dim))

    def predict(
        self, x_t: torch.Tensor, t: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor,
        hidden_layer: int | None = None, condition: torch.Tensor | None = None, route: Route | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """As the stock forward does it."""
        net = self.transformer
        _, _, h, w = x_t.shape
        embeds, pooled = unpacked(tokens, int(net.config.pooled_projection_dim))
        image = net.pos_embed(x_t).contiguous()
        time = net.time_text_embed(t * TIMES, pooled)
        if condition is not None:
            time = time + condition
        text = net.context_embedder(embeds)
        hidden = whole = None
        for index, block in enumerate(net.transformer_blocks):
            if route is not None and index == route.first:
                whole, image = image, route.visible(image)
            if torch.is_grad_enabled() and net.gradient_checkpointing:
                text, image = net._gradient_checkpointing_func(block, image, text, time)
            else:
                text, image = block(hidden_states=image, encoder_hidden_states=text, temb=time)
            if index == hidden_layer:
                hidden = image
            if route is not None and whole is not None and index == route.last:
                image = route.restored(whole, image)
        patches = net.proj_out(net.norm_out(image, time))
        return self._picture(patches, h, w), hidden

    def _picture(self, patches: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """[B, L, p * p * C] -> [B, C, H, W]."""
        p, channels = self.patch_size, int(self.transformer.out_channels)
        h, w = height // p, width // p
        grid = torch.einsum("nhwpqc->nchpwq", patches.reshape(len(patches), h, w, p, p, channels))
        return grid.reshape(len(patches), channels, h * p, w * p)

    @property
    def longest_side(self) -> int | None:
        """Latents along the longest side that the learnt grid of positions covers."""
        most = self.transformer.config.pos_embed_max_size
        return None if most is None else int(most) * self.patch_size

    @property
    def width(self) -> int:
        """Channels of a hidden token."""
        return int(self.transformer.inner_dim)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.transformer.transformer_blocks)

    @property
    def time_bias(self) -> torch.Tensor:
        """Bias [W] of the last layer of the time embedding."""
        bias: torch.Tensor = self.transformer.time_text_embed.timestep_embedder.linear_2.bias
        return bias

    def around(self, network: Any) -> Sd3Denoiser:
        """Another transformer in the same wrapping."""
        return Sd3Denoiser(network)

    def save(self, folder: Path) -> None:
        """Write the stock transformer folder."""
        self.transformer.save_pretrained(folder)
        forget_paths(folder)


def packed(embeds: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    """Tokens [B, T, D] and pooled vector [B, E] as one tensor [B, P + T, D]."""
    b, _, dim = embeds.shape
    rows = -(-pooled.shape[1] // dim)
    return torch.cat([F.pad(pooled, (0, rows * dim - pooled.shape[1])).view(b, rows, dim), embeds], 1)


def unpacked(tokens: torch.Tensor, pooled_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse of `packed`."""
    b, _, dim = tokens.shape
    rows = -(-pooled_dim // dim)
    return tokens[:, rows:], tokens[:, :rows].reshape(b, rows * dim)[:, :pooled_dim]


def build(config: Sd3Config, channels: int, text_dim: int, pooled_dim: int, sample_size: int, seed: int) -> Sd3Denoiser:
    """A fresh transformer for latents of this side and these text encoders; modulations and output start at zero (DiT)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SD3Transformer2DModel(
            sample_size=sample_size,
            pos_embed_max_size=config.largest,
            patch_size=config.patch_size, in_channels=channels, out_channels=channels, num_layers=config.depth,
            attention_head_dim=config.hidden_size // config.num_heads, num_attention_heads=config.num_heads,
            joint_attention_dim=text_dim, caption_projection_dim=config.hidden_size, pooled_projection_dim=pooled_dim,
        )  # fmt: skip
    for name, parameter in network.named_parameters():
        if "norm1" in name or "norm_out" in name or name.startswith("proj_out"):
            torch.nn.init.zeros_(parameter)
    return Sd3Denoiser(network)


def load(folder: Path) -> Sd3Denoiser:
    """A saved transformer, safetensors only, in float32."""
    network = SD3Transformer2DModel.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, torch_dtype=torch.float32, low_cpu_mem_usage=False
    )
    return Sd3Denoiser(network)

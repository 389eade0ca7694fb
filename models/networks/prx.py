"""The default family: diffusers' PRX transformer, in pixel space predicting x_0 or in a VAE's latents predicting the velocity.

`PrxDenoiser` wraps the stock class without changing its weights' names, so that what we train is what diffusers loads. It
adds two things: text features are standardised per dimension (folded into `txt_in` on export, which is exact because
both are linear) and the hidden layer REPA asks for is returned.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_prx import PRXTransformer2DModel, get_image_ids, img2seq, seq2img
from torch import nn

from models.networks.config import PrxShape
from models.networks.denoiser import Denoiser, Prediction
from models.networks.routing import Route


class PrxDenoiser(Denoiser):
    """Text features come in raw; `text_mean` and `text_std` standardise them."""

    def predict(
        self, x_t: torch.Tensor, t: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor,
        hidden_layer: int | None = None, condition: torch.Tensor | None = None, route: Route | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """As the stock forward does it."""
        net = self.transformer
        b, channels, h, w = x_t.shape
        text = net.txt_in((tokens - self.text_mean) / self.text_std)
        image = net.img_in(img2seq(x_t, net.patch_size))
        rotary = net.pe_embedder(get_image_ids(1, h, w, patch_size=net.patch_size, device=x_t.device))
        time = net._compute_timestep_embedding(t, dtype=image.dtype)
        if condition is not None:
            time = time + condition
        hidden = whole = None
        everywhere = rotary
        for index, block in enumerate(net.blocks):
            if route is not None and index == route.first:
                whole, image = image, route.visible(image)
                rotary = route.visible(everywhere.transpose(1, 2)).transpose(1, 2)
            image = block(image, encoder_hidden_states=text, temb=time, image_rotary_emb=rotary, attention_mask=mask)
            if index == hidden_layer:
                hidden = image
            if route is not None and whole is not None and index == route.last:
                image, rotary = route.restored(whole, image), everywhere
        return seq2img(net.final_layer(image, time), net.patch_size, torch.Size((b, channels, h, w))), hidden

    @property
    def width(self) -> int:
        """Channels of a hidden token."""
        return int(self.transformer.hidden_size)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.transformer.blocks)

    @property
    def time_bias(self) -> torch.Tensor:
        """Bias [W] of the last layer of the time embedding."""
        bias: torch.Tensor = self.transformer.time_in.out_layer.bias
        return bias

    def around(self, network: Any) -> PrxDenoiser:
        """The same standardisation around another transformer."""
        return PrxDenoiser(network, self.prediction, self.text_mean, self.text_std)

    def save(self, folder: Path) -> None:
        """Write the stock transformer folder, the text standardisation folded into `txt_in`."""
        net = self.transformer
        weight, bias = net.txt_in.weight.detach().clone(), net.txt_in.bias.detach().clone()
        with torch.no_grad():
            net.txt_in.weight.copy_(weight / self.text_std)
            net.txt_in.bias.copy_(bias - (weight / self.text_std) @ self.text_mean)
        try:
            net.save_pretrained(folder)
            forget_paths(folder)
        finally:
            with torch.no_grad():
                net.txt_in.weight.copy_(weight)
                net.txt_in.bias.copy_(bias)


def build(
    config: PrxShape, text_mean: torch.Tensor, text_std: torch.Tensor, seed: int, channels: int = 3,
    prediction: Prediction = "x_0",
) -> PrxDenoiser:  # fmt: skip
    """A fresh denoiser; the output layer and all modulations start at zero (adaLN-zero, arXiv:2212.09748)."""
    head_dim = config.hidden_size // config.num_heads
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = PRXTransformer2DModel(
            in_channels=channels, patch_size=config.patch_size, context_in_dim=config.text_dim,
            hidden_size=config.hidden_size, mlp_ratio=config.mlp_ratio, num_heads=config.num_heads,
            depth=config.depth, axes_dim=[head_dim // 2, head_dim // 2], theta=config.theta,
        )  # fmt: skip
    for block in net.blocks:
        nn.init.zeros_(block.modulation.lin.weight)
        nn.init.zeros_(block.modulation.lin.bias)
    nn.init.zeros_(net.final_layer.linear.weight)
    nn.init.zeros_(net.final_layer.linear.bias)
    return PrxDenoiser(net, prediction, text_mean, text_std)


def forget_paths(folder: Path) -> None:
    """Take this machine's paths out of the JSON files diffusers and transformers wrote; a digest must not know them."""
    for path in folder.rglob("*.json"):
        content = json.loads(path.read_text())
        if isinstance(content, dict) and content.keys() & {"_name_or_path", "name_or_path"}:
            kept = {key: value for key, value in content.items() if key not in ("_name_or_path", "name_or_path")}
            path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")


def load(
    folder: Path, text_mean: torch.Tensor | None = None, text_std: torch.Tensor | None = None,
    prediction: Prediction = "x_0",
) -> PrxDenoiser:  # fmt: skip
    """A saved denoiser; with a standardisation it is taken out of `txt_in` again (for training on)."""
    net = PRXTransformer2DModel.from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False)
    dim = net.txt_in.in_features
    mean = torch.zeros(dim) if text_mean is None else text_mean.float()
    std = torch.ones(dim) if text_std is None else text_std.float()
    with torch.no_grad():
        folded = net.txt_in.weight.detach().clone()
        net.txt_in.weight.copy_(folded * std)
        net.txt_in.bias.add_(folded @ mean)
    return PrxDenoiser(net, prediction, mean, std)

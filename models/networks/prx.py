"""The default family: diffusers' PRX transformer in pixel space, predicting the clean picture x_0.

`Denoiser` wraps the stock class without changing its weights' names, so that what we train is what diffusers loads. It
adds two things: text features are standardised per dimension (folded into `txt_in` on export, which is exact because
both are linear) and the hidden layer REPA asks for is returned.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers.models.transformers.transformer_prx import PRXTransformer2DModel, get_image_ids, img2seq, seq2img
from torch import nn

from models.networks.config import PrxConfig
from models.networks.routing import Route

T_CLAMP = 0.05  # PRXPixelPipeline divides by max(t, 0.05) when it turns x_0 into a velocity


class Denoiser(nn.Module):
    """x_t, t, text -> x_0. Text features come in raw; `text_mean` and `text_std` standardise them."""

    text_mean: torch.Tensor
    text_std: torch.Tensor

    def __init__(self, transformer: PRXTransformer2DModel, text_mean: torch.Tensor, text_std: torch.Tensor) -> None:
        super().__init__()
        self.transformer = transformer
        self.register_buffer("text_mean", text_mean.float())
        self.register_buffer("text_std", text_std.float())

    def forward(
        self,
        x_t: torch.Tensor,  # [B, 3, H, W]
        t: torch.Tensor,  # [B] in [0, 1], 1 = noise
        tokens: torch.Tensor,  # [B, T, D]
        mask: torch.Tensor,  # [B, T] bool
        hidden_layer: int | None = None,
        condition: torch.Tensor | None = None,  # [B, W]
        route: Route | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The clean picture [B, 3, H, W] and, if asked for, the tokens [B, L, W] after that block (0-based).

        `condition` is added to the time embedding; with a `route` some tokens skip some blocks (training only).
        """
        net = self.transformer
        b, _, h, w = x_t.shape
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
        return seq2img(net.final_layer(image, time), net.patch_size, torch.Size((b, 3, h, w))), hidden


def velocity_of(x_0: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """eps - x_0 of the straight path through x_t that ends in x_0, with the pipeline's clamp on t."""
    return (x_t - x_0) / t.clamp_min(T_CLAMP).view(-1, 1, 1, 1)


def build(config: PrxConfig, text_mean: torch.Tensor, text_std: torch.Tensor, seed: int) -> Denoiser:
    """A fresh denoiser; the output layer and all modulations start at zero (adaLN-zero, arXiv:2212.09748)."""
    head_dim = config.hidden_size // config.num_heads
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = PRXTransformer2DModel(
            in_channels=3, patch_size=config.patch_size, context_in_dim=config.text_dim,
            hidden_size=config.hidden_size, mlp_ratio=config.mlp_ratio, num_heads=config.num_heads,
            depth=config.depth, axes_dim=[head_dim // 2, head_dim // 2], theta=config.theta,
        )  # fmt: skip
    for block in net.blocks:
        nn.init.zeros_(block.modulation.lin.weight)
        nn.init.zeros_(block.modulation.lin.bias)
    nn.init.zeros_(net.final_layer.linear.weight)
    nn.init.zeros_(net.final_layer.linear.bias)
    return Denoiser(net, text_mean, text_std)


def save(denoiser: Denoiser, folder: Path) -> None:
    """Write the stock transformer folder, the text standardisation folded into `txt_in`."""
    net = denoiser.transformer
    weight, bias = net.txt_in.weight.detach().clone(), net.txt_in.bias.detach().clone()
    with torch.no_grad():
        net.txt_in.weight.copy_(weight / denoiser.text_std)
        net.txt_in.bias.copy_(bias - (weight / denoiser.text_std) @ denoiser.text_mean)
    try:
        net.save_pretrained(folder)
        forget_paths(folder)
    finally:
        with torch.no_grad():
            net.txt_in.weight.copy_(weight)
            net.txt_in.bias.copy_(bias)


def forget_paths(folder: Path) -> None:
    """Take this machine's paths out of the JSON files diffusers and transformers wrote; a digest must not know them."""
    for path in folder.rglob("*.json"):
        content = json.loads(path.read_text())
        if isinstance(content, dict) and content.keys() & {"_name_or_path", "name_or_path"}:
            kept = {key: value for key, value in content.items() if key not in ("_name_or_path", "name_or_path")}
            path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")


def load(folder: Path, text_mean: torch.Tensor | None = None, text_std: torch.Tensor | None = None) -> Denoiser:
    """A saved denoiser; with a standardisation it is taken out of `txt_in` again (for training on)."""
    net = PRXTransformer2DModel.from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False)
    dim = net.txt_in.in_features
    mean = torch.zeros(dim) if text_mean is None else text_mean.float()
    std = torch.ones(dim) if text_std is None else text_std.float()
    with torch.no_grad():
        folded = net.txt_in.weight.detach().clone()
        net.txt_in.weight.copy_(folded * std)
        net.txt_in.bias.add_(folded @ mean)
    return Denoiser(net, mean, std)

"""Frozen encoders that make REPA's features while training: the packaged one, or any vision transformer of transformers.

The picture is resized so that the encoder has one patch per token of the denoiser, whatever its aspect; position
embeddings are interpolated. CLS and register tokens are dropped: the patches come last.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModel

from models.device import compute_device
from models.networks.image_encoder import CHANNELS, ImageEncoder
from models.pretraining.repa import Teacher

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

HALF_A_LEVEL = 1 / 255  # cached features are of (p - 127) / 128, a picture in [-1, 1] is (p - 127.5) / 127.5


def teacher_of(name: str, revision: str | None = None) -> tuple[Teacher, int]:
    """(teacher, width of its features) for `packaged` or a repository id or folder."""
    if name == "packaged":
        return PackagedTeacher(), CHANNELS[-1]
    teacher = TransformerTeacher(name, revision)
    return teacher, teacher.width


class PackagedTeacher:
    """EfficientNet-Lite0's 40 channels, one vector per 4 x 4 pixels."""

    def __init__(self) -> None:
        self.encoder = ImageEncoder().to(compute_device())

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Features [B, h, w, 40] of pictures [B, 3, H, W] in [-1, 1]."""
        features: torch.Tensor = self.encoder(images + HALF_A_LEVEL)[-1]
        if tuple(features.shape[-2:]) != grid:
            features = F.interpolate(features, grid, mode="bilinear", antialias=True, align_corners=False)
        return features.permute(0, 2, 3, 1)


class TransformerTeacher:
    """A DINOv2-like encoder by repository id or folder."""

    def __init__(self, name: str, revision: str | None = None) -> None:
        self.model: Any = AutoModel.from_pretrained(name, revision=revision, use_safetensors=True)
        self.model = getattr(self.model, "vision_model", self.model).to(compute_device()).eval().requires_grad_(False)
        config = self.model.config
        if not hasattr(config, "patch_size"):
            raise ValueError(f"repa.teacher={name!r} is no vision transformer (its config has no patch_size)")
        self.patch, self.width = int(config.patch_size), int(config.hidden_size)
        mean, std = _normalisation(name, revision)
        self.mean, self.std = (torch.tensor(x, device=compute_device()).view(1, 3, 1, 1) for x in (mean, std))

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Features [B, h, w, E] of pictures [B, 3, H, W] in [-1, 1], one per token of the grid (h, w)."""
        h, w = grid
        size = (h * self.patch, w * self.patch)
        pixels = F.interpolate(images / 2 + 0.5, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        pixels = (pixels - self.mean) / self.std
        native = getattr(self.model.config, "image_size", None)
        more = (
            {}
            if native in (size, [*size]) or "Dinov2" in type(self.model).__name__
            else {"interpolate_pos_encoding": True}
        )
        states: torch.Tensor = self.model(pixel_values=pixels, **more).last_hidden_state
        return states[:, -h * w :].reshape(len(images), h, w, self.width)


def _normalisation(name: str, revision: str | None) -> tuple[Any, Any]:
    """Mean and std the encoder was trained with; ImageNet's where it does not say."""
    try:
        processor = AutoImageProcessor.from_pretrained(name, revision=revision, use_fast=True)
    except (OSError, ValueError):
        return IMAGENET_MEAN, IMAGENET_STD
    return processor.image_mean, processor.image_std

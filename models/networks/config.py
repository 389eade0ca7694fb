"""What the denoiser looks like."""

from __future__ import annotations

from pydantic import Field

from infra.config import Config


class PrxConfig(Config):
    """diffusers' PRXTransformer2DModel in pixel space with x_0-prediction; the defaults train on two CPU cores."""

    hidden_size: int = Field(default=128, ge=32, description="Width of the transformer")
    depth: int = Field(default=6, ge=1, description="Number of blocks")
    num_heads: int = Field(default=4, ge=1, description="Attention heads")
    mlp_ratio: float = Field(default=3.5, gt=0, description="MLP width over hidden size")
    patch_size: int = Field(default=4, ge=1, description="Side of a square patch in pixels")
    theta: int = Field(default=100, ge=1, description="RoPE base; small pictures want a small one")
    text_dim: int = Field(default=384, ge=1, description="Width of the text encoder's features")
    prompt_max_tokens: int = Field(default=64, ge=8, description="Prompt length the exported pipeline pads to")

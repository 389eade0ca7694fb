"""What the denoiser looks like, family by family; what of it is adapted."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import Discriminator, Field, Tag, model_validator

from infra.config import Config
from infra.stages import IF_SET

FamilyName = Literal["prx-pixel", "prx-latent", "sd3", "unet"]


class PrxShape(Config):
    """What diffusers' PRXTransformer2DModel is built from."""

    hidden_size: int = Field(default=128, ge=32, description="Width of the transformer")
    depth: int = Field(default=6, ge=1, description="Number of blocks")
    num_heads: int = Field(default=4, ge=1, description="Attention heads")
    mlp_ratio: float = Field(default=3.5, gt=0, description="MLP width over hidden size")
    patch_size: int = Field(default=4, ge=1, description="Side of a square patch in pixels")
    theta: int = Field(default=100, ge=1, description="RoPE base; small pictures want a small one")
    text_dim: int = Field(default=384, ge=1, description="Width of the text encoder's features")
    prompt_max_tokens: int = Field(default=64, ge=8, description="Prompt length the exported pipeline pads to")

    @model_validator(mode="after")
    def _heads_turn(self) -> Self:
        if self.hidden_size % (4 * self.num_heads):
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of 4 x num_heads={self.num_heads}; a head needs an even "
                "number of channels for each of height and width"
            )
        return self


class PrxConfig(PrxShape):
    """PRX in pixel space with x_0-prediction; the defaults train on two CPU cores."""

    kind: Literal["prx-pixel"] = Field(default="prx-pixel", description="Family", json_schema_extra=IF_SET)


class LatentPrxConfig(PrxShape):
    """The same transformer in the latents of a VAE, predicting the velocity."""

    kind: Literal["prx-latent"] = Field(default="prx-latent", description="Family")
    patch_size: int = Field(default=2, ge=1, description="Side of a square patch in latents")


class Sd3Config(Config):
    """A fresh SD3Transformer2DModel for the text encoders and the VAE of another SD3 pipeline."""

    kind: Literal["sd3"] = Field(default="sd3", description="Family")
    hidden_size: int = Field(default=1536, ge=16, description="Width of the transformer")
    depth: int = Field(default=24, ge=1, description="Number of blocks")
    num_heads: int = Field(default=24, ge=1, description="Attention heads")
    patch_size: int = Field(default=2, ge=1, description="Side of a square patch in latents")
    largest: int = Field(default=192, ge=1, description="Most patches along a side that have a place")
    prompt_max_tokens: int = Field(default=256, ge=8, le=512, description="T5 tokens; 256 is the pipeline's default")

    @model_validator(mode="after")
    def _heads_share(self) -> Self:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}; make it one"
            )
        return self


class UNetConfig(Config):
    """diffusers' UNet2DConditionModel under the flow-matching objective, in pixels or in latents, predicting the velocity."""

    kind: Literal["unet"] = Field(default="unet", description="Family")
    channels: tuple[int, ...] = Field(default=(64, 128), min_length=1, description="Channels of each level")
    layers: int = Field(default=1, ge=1, description="Residual blocks of each level")
    head_dim: int = Field(default=8, ge=1, description="Channels of an attention head")
    text_dim: int = Field(default=384, ge=1, description="Width of the text encoder's features")
    prompt_max_tokens: int = Field(default=64, ge=8, description="Prompt length in tokens")

    @property
    def depth(self) -> int:
        """Blocks whose tokens could be aligned: none, a UNet has no one token grid."""
        return 0


def _kind(value: Any) -> str:
    found = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return str(found or "prx-pixel")  # presets may leave it out


NetworkConfig: TypeAlias = Annotated[
    Annotated[PrxConfig, Tag("prx-pixel")]
    | Annotated[LatentPrxConfig, Tag("prx-latent")]
    | Annotated[Sd3Config, Tag("sd3")]
    | Annotated[UNetConfig, Tag("unet")],
    Discriminator(_kind),
]


class LoraConfig(Config):
    """Low-rank adapters (arXiv:2106.09685) on the linear layers of every block."""

    kind: Literal["lora", "rslora", "dora", "loha", "lokr"] = Field(
        default="lora",
        description="LoRA; rsLoRA: scale alpha / sqrt(rank); DoRA: also learns the length of each row; LoHa, LoKr: elementwise "
        "and Kronecker products of small matrices (arXiv:2309.14859)",
    )
    rank: int = Field(default=16, ge=1, description="Rank of each adapter")
    alpha: float | None = Field(default=None, gt=0, description="Numerator of the scale; null: the rank, scale 1")
    rank_pattern: dict[str, int] = Field(default={}, description="Other ranks by the end of a layer's name")
    alpha_pattern: dict[str, float] = Field(default={}, description="Other alphas by the end of a layer's name")
    init: Literal["zero", "gaussian", "pissa"] = Field(
        default="zero", description="zero, gaussian: B = 0; pissa: the layer's leading singular vectors"
    )
    targets: tuple[str, ...] = Field(
        default=("img_qkv_proj", "txt_kv_proj", "to_out.0", "gate_proj", "up_proj", "down_proj"),
        min_length=1,
        description="Names of the adapted linear layers",
    )

    base: Literal["fp32", "int8"] = Field(
        default="fp32", description="int8: the frozen blocks in 8 bits while the adapter learns; it is merged into the base's own",
        json_schema_extra=IF_SET,
    )  # fmt: skip

    @model_validator(mode="after")
    def _patterns_are_sound(self) -> LoraConfig:
        if self.base == "int8" and self.init == "pissa":
            raise ValueError(
                "lora.init=pissa moves part of the base, which int8 holds fast; set init to zero or base to fp32"
            )
        for field, pattern in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            for name, value in pattern.items():
                if value <= 0:
                    raise ValueError(f"lora.{field}.{name}={value} is not above 0; give a rank or alpha above 0")
        if self.init == "pissa" and self.kind == "dora":
            raise ValueError(
                "lora.init=pissa changes the base, whose rows dora measures; set init to zero or kind to lora"
            )
        if self.init != "zero" and self.kind in ("loha", "lokr"):
            raise ValueError(f"lora.init={self.init} is for one pair of factors; set init to zero for kind={self.kind}")
        return self

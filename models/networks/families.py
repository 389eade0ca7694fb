"""The one place that knows the families: how each is built, loaded, surrounded by text encoder and codec, and put in a pipeline.

| family | denoises | predicts | text | stock pipeline |
| prx-pixel | pixels | x_0 | packaged MiniLM | PRXPixelPipeline |
| prx-latent | a VAE's latents | velocity | packaged MiniLM or the folder's | PRXPipeline |
| sd3 | a VAE's latents | velocity | CLIP, CLIP, T5 | StableDiffusion3Pipeline |
| unet | pixels or latents | velocity | packaged MiniLM | none for flow matching: the module alone |
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, assert_never

import torch

from models.device import compute_device
from models.networks import prx, sd3, unet
from models.networks.codec import Codec, Pixels, load_vae
from models.networks.config import LatentPrxConfig, NetworkConfig, PrxConfig, Sd3Config, UNetConfig
from models.networks.denoiser import Denoiser
from models.networks.text_features import Encode, PackagedText, PrxText, Sd3Text

if TYPE_CHECKING:
    from models.networks.checkpoint import SamplingCard


@dataclass(frozen=True)
class Surroundings:
    """What stands around a denoiser and is never trained."""

    encode: Encode
    codec: Codec


def family_of(config: NetworkConfig) -> dict[str, str]:
    """The family's part of a sampling card."""
    match config:
        case LatentPrxConfig():
            return {"family": "prx-latent", "prediction": "velocity"}
        case PrxConfig():
            return {"family": "prx-pixel", "prediction": "x_0"}
        case Sd3Config():
            return {"family": "sd3", "prediction": "velocity"}
        case UNetConfig():
            return {"family": "unet", "prediction": "velocity"}
        case _:
            assert_never(config)


def surroundings(folder: Path, card: SamplingCard) -> Surroundings:
    """Text encoder and codec of a checkpoint, from its own folder or packaged."""
    length = card.prompt_max_tokens
    codec = load_vae(folder / "vae") if (folder / "vae").is_dir() else Pixels()
    match card.family:
        case "prx-pixel":
            packaged = not (folder / "text_encoder").is_dir()
            return Surroundings(PackagedText(length) if packaged else PrxText(folder, length, clean=False), codec)
        case "prx-latent":
            return Surroundings(PrxText(folder, length, clean=True), codec)
        case "sd3":
            config = json.loads((folder / "transformer" / "config.json").read_text())
            return Surroundings(Sd3Text(folder, length, int(config["joint_attention_dim"])), codec)
        case "unet":  # in latents its captions come from the features stage, cleaned as PRXPipeline does
            pixels = isinstance(codec, Pixels)
            return Surroundings(PackagedText(length) if pixels else PrxText(folder, length, clean=True), codec)
        case _:
            assert_never(card.family)


def build(
    config: NetworkConfig, frozen: Path | None, text_mean: torch.Tensor, text_std: torch.Tensor, side: int, seed: int
) -> Denoiser:
    """A fresh denoiser for the VAE and the text encoders in `frozen` (None: pixels, packaged text), on this process's device."""
    return _built(config, frozen, text_mean, text_std, side, seed).to(compute_device())


def _built(
    config: NetworkConfig, frozen: Path | None, text_mean: torch.Tensor, text_std: torch.Tensor, side: int, seed: int
) -> Denoiser:
    vae = load_vae(frozen / "vae") if frozen is not None and (frozen / "vae").is_dir() else None
    channels = 3 if vae is None else vae.channels
    match config:
        case LatentPrxConfig():
            if vae is None:
                raise ValueError("prx-latent needs a VAE; set `autoencoder` or `model` to where it comes from")
            return prx.build(config, text_mean, text_std, seed, channels, "velocity")
        case PrxConfig():
            return prx.build(config, text_mean, text_std, seed)
        case Sd3Config():
            if frozen is None or vae is None:
                raise ValueError("sd3 needs text encoders and a VAE; set `model` to an SD3 pipeline that has them")
            told = json.loads((frozen / "transformer" / "config.json").read_text())
            dims = int(told["joint_attention_dim"]), int(told["pooled_projection_dim"])
            return sd3.build(config, channels, *dims, side // vae.factor, seed)
        case UNetConfig():
            return unet.build(config, text_mean, text_std, channels, seed)
        case _:
            assert_never(config)


def load(
    folder: Path, card: SamplingCard, text_mean: torch.Tensor | None = None, text_std: torch.Tensor | None = None
) -> Denoiser:
    """The denoiser whose network lies in `folder`, on this process's device.

    With a standardisation it is taken out of the weights (to train on).
    """
    return _loaded(folder, card, text_mean, text_std).to(compute_device())


def _loaded(
    folder: Path, card: SamplingCard, text_mean: torch.Tensor | None, text_std: torch.Tensor | None
) -> Denoiser:
    match card.family:
        case "prx-pixel" | "prx-latent":
            return prx.load(folder, text_mean, text_std, card.prediction)
        case "sd3":
            return sd3.load(folder)
        case "unet":
            return unet.load(folder)
        case _:
            assert_never(card.family)

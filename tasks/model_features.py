"""Stage functions that bring a foreign model in, and the training set into its terms: its text features, its latents."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from data_curation.encoders import filled
from infra.arrays import save_arrays
from infra.encode_cache import Index, Space, key_of, space, through
from infra.errors import DataRefused
from infra.local_files import weights_digest
from infra.stages import StageContext
from models.device import compute_device
from models.engine.distribute import one_thread
from models.networks import families
from models.networks.checkpoint import read_card
from models.networks.codec import Vae
from models.networks.take_over import take_over
from models.networks.text_features import Encode
from tasks.config import FeaturesConfig, ModelConfig
from tasks.training_data import to_model

CHUNK = 16  # prompts or pictures encoded at a time
KEPT_TOGETHER = 512  # pictures whose latents are kept in one go
KEPT = ("index.parquet", "captions.parquet")


def import_model(config: ModelConfig, ctx: StageContext) -> dict[str, Any]:
    """A foreign pipeline as a checkpoint: its own files, and how it is sampled."""
    names = ("side", "steps", "guidance", "prompt_max_tokens")
    card, origin = take_over(config.source, ctx.out, {name: getattr(config, name) for name in names})
    return {"family": card.family, "origin": origin}


def features(config: FeaturesConfig, ctx: StageContext) -> dict[str, Any]:
    """The training set once more, with text features of the model's encoders and latents of its VAE."""
    source, model = ctx.inputs["data"], ctx.inputs["model"]
    around = families.surroundings(model, read_card(model))
    for name in KEPT:
        shutil.copyfile(source / name, ctx.out / name)
    captions = read_captions(source)
    latents = latent_space(ctx.root, model) if isinstance(around.codec, Vae) else None
    index = {} if latents is None else latents.index()
    with one_thread():
        tokens = encode_captions(around.encode, captions, ctx)
        pictures = made = 0
        for path in sorted(source.glob("images-*.safetensors")):
            shutil.copyfile(path, ctx.out / path.name)
            if isinstance(around.codec, Vae) and latents is not None:
                count, new = encode_bucket(around.codec, path, ctx.out, latents, index)
                pictures, made = pictures + count, made + new
    if isinstance(around.codec, Vae):
        scaling = around.codec.scaling
        (ctx.out / "latents.json").write_text(json.dumps({"scale": scaling.scale, "shift": scaling.shift}) + "\n")
    return {"captions": len(captions), "tokens": tokens, "latents": pictures, "latents_encoded": made}


def latent_space(root: str | None, model: Path) -> Space:
    """Where latents are kept: by the VAE's weights and settings, torch and the kind of device."""
    settings = hashlib.sha256((model / "vae" / "config.json").read_bytes()).hexdigest()
    packages = {package: version(package) for package in ("torch", "diffusers")}
    return space(root, "latents", "float32", weights=weights_digest(model / "vae"), settings=settings, batch=CHUNK,
                 packages=packages, device=compute_device().type)  # fmt: skip


def read_captions(folder: Path) -> list[str]:
    """Captions of a training set in the order of their ids."""
    import pyarrow.parquet as pq

    found: list[str] = pq.read_table(folder / "captions.parquet")["text"].to_pylist()
    return found


def encode_captions(encode: Encode, captions: Sequence[str], ctx: StageContext) -> int:
    """text.safetensors: real tokens of every caption, one after the other, with their mean and deviation."""
    states: list[np.ndarray] = []
    for start in range(0, len(captions), CHUNK):
        tokens, mask = encode(captions[start : start + CHUNK])
        states += [t[m].numpy().astype(np.float16) for t, m in zip(tokens, mask, strict=True)]
        ctx.progress(min(start + CHUNK, len(captions)), len(captions), {})
    joined = np.concatenate(states)
    offsets = np.concatenate([[0], np.cumsum([len(s) for s in states])]).astype(np.int64)
    std = joined.std(axis=0, dtype=np.float64)
    save_arrays(ctx.out / "text.safetensors", {
        "tokens": joined, "offsets": offsets, "mean": joined.mean(axis=0, dtype=np.float64).astype(np.float32),
        "std": np.where(std < 1e-3, 1.0, std).astype(np.float32),
    })  # fmt: skip
    return len(joined)


def encode_bucket(vae: Vae, path: Path, out: Path, latents: Space, index: Index) -> tuple[int, int]:
    """latents-WxH.safetensors: posterior mean and log-variance of a bucket's pictures; how many, how many encoded now."""
    pictures = load_file(path)["images"]
    height, width = pictures.shape[1:3]
    if height % vae.factor or width % vae.factor:
        raise DataRefused(
            f"bucket {width}x{height} is not a multiple of the VAE's {vae.factor} px; set data.buckets.patch to a multiple"
        )
    found, made = list[np.ndarray](), 0
    for at in range(0, len(pictures), KEPT_TOGETHER):  # a killed encode goes on after the last of these
        part = pictures[at : at + KEPT_TOGETHER]
        keys = [key_of(hashlib.sha256(picture.tobytes()).digest(), picture.shape) for picture in part]
        arrays, new = through(latents, index, keys, functools.partial(_moments, vae, part))
        found, made = [*found, *arrays], made + new
    name = path.name.replace("images-", "latents-")
    save_arrays(out / name, {"moments": np.stack(found)})
    return len(pictures), made


def _moments(vae: Vae, pictures: np.ndarray, places: list[int]) -> list[np.ndarray]:
    """Of the pictures at these places; every batch has one shape, so that no picture's bits depend on the others."""
    found: list[np.ndarray] = []
    for own, batch in filled(places, CHUNK):
        found += list(vae.moments(to_model(pictures[batch])).float().cpu().numpy()[: len(own)])
    return found

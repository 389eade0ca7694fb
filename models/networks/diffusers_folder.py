"""A foreign diffusers pipeline as a start: found as a local folder or on the Hugging Face hub, checked, taken over file by file.

Only safetensors, JSON and tokenizer files are taken: a pickle can run code when it is loaded, so a component whose weights
come as a pickle alone is refused. A hub model is taken at one commit, which is recorded; offline, from its cache.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.errors import ConfigError, DataRefused
from models.networks.config import FamilyName

FAMILIES: dict[str, FamilyName] = {
    "StableDiffusion3Pipeline": "sd3",
    "PRXPipeline": "prx-latent",
    "PRXPixelPipeline": "prx-pixel",
}
FROZEN = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
OPTIONAL: dict[FamilyName, tuple[str, ...]] = {"sd3": ("text_encoder_3", "tokenizer_3")}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")
TAKEN = (".json", ".txt", ".model", ".safetensors")
VARIANT = re.compile(r"\.(fp16|bf16|fp32|non_ema)(\.|-)")
HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+(@[\w./-]+)?$")


@dataclass(frozen=True)
class Found:
    """A pipeline folder on this machine, what it is, and where it came from."""

    folder: Path
    family: FamilyName
    pipeline: str
    index: dict[str, Any]
    revision: str | None  # commit of a hub model


def find(source: str) -> Found:
    """The folder of `source`: a path, or a hub id with an optional revision, OWNER/NAME@REVISION."""
    place = Path(source).expanduser()
    if place.exists():
        return look(place, None)
    if not HUB_ID.match(source):
        raise ConfigError(
            f"model {source!r} is no folder here and no hub id; give a diffusers folder or OWNER/NAME@REVISION"
        )
    folder = _downloaded(source)
    return look(folder, folder.name)


def _downloaded(source: str) -> Path:
    """The snapshot of a hub model: its folder is named by the commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = source.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=[f"*{end}" for end in TAKEN]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"model {source!r} is no folder here and cannot be had from the hub ({_first_line(error)}); give a local folder, "
            "or download it first and leave HF_HUB_OFFLINE unset"
        ) from error


def look(folder: Path, revision: str | None) -> Found:
    """Check a pipeline folder: its class, its components and that every weight is a safetensors file."""
    path = folder / "model_index.json"
    try:
        index = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model {folder} is not a diffusers folder: {path.name} {_first_line(error)}; give a folder that "
            "DiffusionPipeline.save_pretrained wrote"
        ) from error
    name = str(index.get("_class_name"))
    if name not in FAMILIES:
        raise ConfigError(f"model {folder} is a {name}; supported are {', '.join(FAMILIES)}")
    found = Found(folder, FAMILIES[name], name, index, revision)
    optional = OPTIONAL.get(found.family, ())
    for part in ("transformer", *FROZEN):
        if part in index and index[part] != [None, None]:
            _check_component(folder / part, weights=not part.startswith("tokenizer"))
        elif part in index and part not in optional and not (part == "vae" and found.family == "prx-pixel"):
            raise DataRefused(
                f"model {folder}: {name} has no {part}; only {', '.join(optional) or 'nothing'} may be missing"
            )
    return found


def _check_component(folder: Path, weights: bool) -> None:
    if not folder.is_dir():
        raise DataRefused(f"model part {folder} is missing, though model_index.json lists it; copy the whole folder")
    if weights:
        refuse_pickles(folder)


def refuse_pickles(folder: Path) -> None:
    """A component must have safetensors weights; pickles beside them are left alone, pickles instead of them are refused."""
    names = sorted(path.name for path in folder.iterdir())
    if any(name.endswith(".safetensors") and not VARIANT.search(name) for name in names):
        return
    pickled = [name for name in names if name.endswith(PICKLES)]
    if pickled:
        raise DataRefused(
            f"{folder} has its weights only as {pickled[0]}, a pickle, which can run code; "
            "save it again with safe_serialization=True"
        )
    raise DataRefused(
        f"{folder} has no .safetensors weights, only {', '.join(names) or 'nothing'}; copy the whole folder"
    )


def class_of(folder: Path) -> str:
    """The class that a component's config.json names."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise DataRefused(
            f"{folder} has no readable config.json ({_first_line(error)}); copy the whole folder"
        ) from error
    return str(config.get("_class_name") or (config.get("architectures") or ["unknown"])[0])


def take(source: Path, target: Path, parts: tuple[str, ...] = FROZEN, link: bool = True) -> None:
    """The named components of a folder in another one; weights are linked where they may be and the file system can."""
    for part in parts:
        if not (source / part).is_dir():
            continue
        for path in sorted((source / part).rglob("*")):
            if path.is_file() and path.suffix in TAKEN and not VARIANT.search(path.name):
                place = target / path.relative_to(source)
                place.parent.mkdir(parents=True, exist_ok=True)
                _put(path.resolve(), place, link and path.suffix == ".safetensors")


def _put(path: Path, place: Path, link: bool) -> None:
    if link:
        with contextlib.suppress(OSError):
            os.link(path, place)
            return
    shutil.copyfile(path, place)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

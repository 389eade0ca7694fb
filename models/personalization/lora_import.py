"""Strict import of LoRA files: peft folder, diffusers file, kohya file.

Stock loaders are permissive: a wrong prefix has no effect, half a pair a partial one, NaN draws NaN, all without an
error. Here each key is matched to a layer of the base, both halves are there, finite and of the layer's shape, the
base's digest is compared, and pickles are never opened; a refusal names the file and the key.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from models.personalization import lycoris
from models.personalization.lora_files import (
    DIFFUSERS_FILE,
    KOHYA_PREFIXES,
    PEFT_FILE,
    ROWS_FILE,
    Adapter,
    attach,
    linear_sides,
)

TRANSFORMER = "transformer"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
PEFT_PARTS = {".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_magnitude_vector": "m"}
KOHYA_PARTS = {".lora_down.weight": "A", ".lora_up.weight": "B", ".alpha": "alpha", ".dora_scale": "m"}
PRODUCT_PARTS = {f".{part}": part for sets in lycoris.PARTS.values() for names in sets for part in sorted(names)}
PRODUCT_KOHYA = PRODUCT_PARTS | {".alpha": "alpha"}

Form = Literal["peft", "diffusers", "kohya"]
logger = logging.getLogger(__name__)


def load(module: nn.Module, path: Path, base: str | None = None, name: str = "default") -> Adapter:
    """Read a file of any form strictly and put it on the module, which stays untouched if the file is refused."""
    adapter = read(path, module, base)
    if base is None or "base" not in adapter.about:
        why = "no digest was given" if base is None else "the file names none"
        logger.warning("%s: base not compared, %s", path, why)
    attach(module, adapter, name)
    return adapter


def read(path: Path, module: nn.Module, base: str | None = None) -> Adapter:
    """The adapter in a peft folder, a diffusers file or a kohya file; every refusal names the file and the key.

    `base` is the digest of the base at hand; it must be the one the file names, if the file names one. What changes
    text encoders too is refused: half of it would draw something else.
    """
    rows = path / ROWS_FILE
    if rows.is_file():
        raise ValueError(f"{rows} belongs to this adapter, which means nothing without its word; take the checkpoint")
    return read_with_text(path, module, {}, base)[0]


def read_with_text(
    path: Path, module: nn.Module, encoders: Mapping[str, nn.Module], base: str | None = None
) -> tuple[Adapter, dict[str, Adapter]]:
    """As `read`, with the adapters of a diffusers file for text encoders, by name; `encoders` are those at hand, stock."""
    file = _locate(path)
    tensors, header = _open(file)
    about = _json(file, "t2i", header.get("t2i", "{}"))
    _compare_base(file, about.get("base"), base)
    form = _form(file, tensors)
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        owner = key.split(".")[0] if form == "diffusers" and key.startswith("text_encoder") else TRANSFORMER
        if owner != TRANSFORMER and owner not in encoders:
            raise ValueError(
                f"{file}: {key} is for {owner}, which the base at hand does not hand out; take the checkpoint"
            )
        groups.setdefault(owner, {})[key] = value
    parts = {TRANSFORMER: module, **encoders}
    found = {
        owner: _adapter(
            file, owner, group, linear_sides(parts[owner]), _settings(file, form, header, owner), form, about
        )
        for owner, group in groups.items()
    }
    if TRANSFORMER not in found:
        raise ValueError(f"{file}: changes text encoders only; there is no adapter of the denoiser in it")
    return found.pop(TRANSFORMER), found


def _adapter(
    file: Path, owner: str, tensors: dict[str, Tensor], sides: dict[str, tuple[int, int]], settings: dict[str, Any],
    form: Form, about: dict[str, str],
) -> Adapter:  # fmt: skip
    """The adapter of one module, the keys of other modules left out."""
    suffixes = _suffixes(form, tensors)
    parts: dict[str, dict[str, tuple[str, Tensor]]] = {}  # layer -> A, B or alpha -> key, tensor
    for key, value in sorted(tensors.items()):
        layer, part = _place(file, key, form, sides, suffixes, owner)
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{file}: {key} has NaN or infinite values; the training broke, train again")
        if part in parts.setdefault(layer, {}):
            raise ValueError(f"{file}: {key} and {parts[layer][part][0]} are the same part of {layer}; keep one")
        parts[layer][part] = (key, value)
    if suffixes is PRODUCT_PARTS or suffixes is PRODUCT_KOHYA:
        products = {layer: _product(file, layer, found, sides[layer], settings) for layer, found in parts.items()}
        return Adapter.of_products(products, about)
    layers = {layer: _layer(file, layer, found, sides[layer], settings) for layer, found in parts.items()}
    magnitudes = _magnitudes(file, parts, sides, settings)
    if not magnitudes and not any(bool(b.any()) for _, b in layers.values()):
        logger.warning("%s: every B is zero; this adapter changes nothing", file)
    return Adapter(layers, about, magnitudes)


def base_of(path: Path) -> str | None:
    """Digest of the base that an adapter's file names."""
    file = _locate(path)
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata() or {}
    told = _json(file, "t2i", header.get("t2i", "{}")).get("base")
    return None if told is None else str(told)


def _magnitudes(
    file: Path, parts: dict[str, dict[str, tuple[str, Tensor]]], sides: dict[str, tuple[int, int]], said: dict[str, Any]
) -> dict[str, Tensor]:
    """DoRA's m [O] of every layer, or nothing for plain LoRA; kohya's form has it as [O, 1]."""
    found = {layer: of["m"] for layer, of in parts.items() if "m" in of}
    if said and bool(said.get("use_dora")) != bool(found):
        there = "has" if found else "has no"
        raise ValueError(f"{file}: {there} DoRA magnitudes, but use_dora is {said.get('use_dora')}; export it again")
    for layer in parts:
        if found and layer not in found:
            raise ValueError(f"{file}: {layer} has no DoRA magnitude, other layers have; the file is incomplete")
    for layer, (key, value) in found.items():
        outputs = sides[layer][0]
        if tuple(value.shape) not in ((outputs,), (outputs, 1)):
            raise ValueError(f"{file}: {key} has shape {tuple(value.shape)}, not ({outputs},); it is of another base")
    return {layer: value.float().flatten() for layer, (_, value) in found.items()}


def _layer(
    file: Path, layer: str, found: dict[str, tuple[str, Tensor]], sides: tuple[int, int], settings: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """A and the scaled B of one layer."""
    for part in ("A", "B"):
        if part not in found:
            there = next(iter(found.values()))[0]
            raise ValueError(f"{file}: {there} is there but {layer}'s {part} is not; the file is incomplete")
    (key_a, a), (key_b, b) = found["A"], found["B"]
    rank = a.shape[0] if a.ndim == 2 else 0
    for key, value, want in ((key_a, a, (rank, sides[1])), (key_b, b, (sides[0], rank))):
        if rank == 0 or tuple(value.shape) != want:
            raise ValueError(
                f"{file}: {key} has shape {tuple(value.shape)}, not {want}, for {layer} of {sides[1]} inputs and "
                f"{sides[0]} outputs; it is an adapter of another base"
            )
    scale = _alpha(file, *found["alpha"]) / rank if "alpha" in found else _scale(file, key_a, layer, rank, settings)
    return a.float(), b.float() if scale == 1 else scale * b.float()


def _scale(file: Path, key: str, layer: str, rank: int, settings: dict[str, Any]) -> float:
    """The factor s of a layer; 1 where the file says nothing, as diffusers and kohya both take it."""
    if not settings:
        return 1.0
    if settings.get("lora_bias"):
        raise ValueError(f"{file}: lora_bias is set in its settings; only LoRA and DoRA without bias are read")
    ranks, alphas = settings.get("rank_pattern") or {}, settings.get("alpha_pattern") or {}
    said = ranks.get(get_pattern_key(ranks.keys(), layer), settings.get("r"))
    if said != rank:
        raise ValueError(f"{file}: {key} has rank {rank}, its settings say {said}; file and settings do not belong")
    alpha = alphas.get(get_pattern_key(alphas.keys(), layer), settings.get("lora_alpha", settings.get("alpha")))
    if not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise ValueError(f"{file}: lora_alpha of {key} is {alpha!r}, not a number > 0; correct its settings")
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _locate(path: Path) -> Path:
    """The safetensors file that a path means."""
    file = path
    if path.is_dir():
        known = [path / PEFT_FILE, path / DIFFUSERS_FILE]
        others = sorted(p for p in path.iterdir() if p.suffix in PICKLES)
        file = next((p for p in known if p.exists()), others[0] if others else known[0])
    if file.suffix in PICKLES:
        raise ValueError(f"{file}: {file.suffix} is a pickle, which can run code; ask for a .safetensors file")
    if not file.is_file():
        raise ValueError(f"{file}: no such adapter; give a .safetensors file or a folder with {PEFT_FILE}")
    return file


def _open(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118, not a dict
            header = opened.metadata() or {}
    except SafetensorError as broken:
        raise ValueError(f"{file}: not a safetensors file ({broken}); download or export it again") from broken
    if not tensors:
        raise ValueError(f"{file}: holds no tensors; export it again")
    return tensors, header


def _form(file: Path, tensors: dict[str, Tensor]) -> Form:
    if file.name == PEFT_FILE:
        return "peft"
    return "kohya" if any(key.startswith(KOHYA_PREFIXES) for key in tensors) else "diffusers"


def _suffixes(form: Form, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """How keys may end, and which part that is: of LoRA, or of LoHa and LoKr if no key ends as LoRA's (diffusers has none)."""
    plain = KOHYA_PARTS if form == "kohya" else PEFT_PARTS
    own = tuple(suffix for suffix in plain if suffix != ".alpha")
    if form == "diffusers" or any(key.endswith(own) for key in tensors):
        return plain
    return PRODUCT_KOHYA if form == "kohya" else PRODUCT_PARTS


def _product(
    file: Path, layer: str, found: dict[str, tuple[str, Tensor]], sides: tuple[int, int], said: dict[str, Any]
) -> lycoris.Product:
    """A layer's LoHa or LoKr with its scale folded in; a whole W_2 has no rank, so kohya's alpha means nothing there."""
    parts = {name: value.float() for name, (_, value) in found.items() if name != "alpha"}
    low = next((int(value.shape[-1]) for name, value in sorted(parts.items()) if name.endswith("_a")), None)
    ranks = said.get("rank_pattern") or {}
    rank = ranks.get(get_pattern_key(ranks.keys(), layer), said.get("r", low or 1))
    try:
        product = lycoris.checked(layer, lycoris.Product(lycoris.kind_of(layer, set(parts)), rank, parts), sides)
    except ValueError as broken:
        raise ValueError(f"{file}: {broken}") from broken
    if said and str(said.get("peft_type")).lower() != product.kind:
        raise ValueError(
            f"{file}: {layer} is a {product.kind}, its settings say {said.get('peft_type')}; export it again"
        )
    scale = 1.0
    if said:
        scale = _scale(file, layer, layer, low or rank, said)
    elif low is not None and "alpha" in found:
        scale = _alpha(file, *found["alpha"]) / low
    parts[lycoris.SCALED[product.kind]] *= scale
    return product


def _alpha(file: Path, key: str, alpha: Tensor) -> float:
    """kohya's numerator of the scale."""
    if alpha.numel() != 1 or float(alpha) <= 0:
        raise ValueError(f"{file}: {key} is {alpha.flatten()[:4].tolist()}, not one number > 0; export it again")
    return float(alpha)


def _place(
    file: Path, key: str, form: Form, sides: dict[str, tuple[int, int]], suffixes: dict[str, str], owner: str
) -> tuple[str, str]:  # fmt: skip
    """The layer a key belongs to and which part of it: A, B or alpha."""
    suffix = next((s for s in suffixes if key.endswith(s)), None)
    if suffix is None:
        what = "LoRA or DoRA" if "A" in suffixes.values() else "LoHa or LoKr"
        raise ValueError(f"{file}: {key} is no part of a {what} ({', '.join(suffixes)}); it would be lost")
    stem = key.removesuffix(suffix)
    match form:
        case "kohya":
            prefix = next((p for p in KOHYA_PREFIXES if key.startswith(p)), None)
            names = [n for n in sides if prefix and n.replace(".", "_") == stem.removeprefix(prefix)]
        case "diffusers":
            names = [n for n in sides if f"{owner}.{n}" == stem]
        case "peft":
            names = [n for n in sides if n == stem.removeprefix("base_model.model.")]
    if len(names) != 1:
        raise ValueError(f"{file}: {key} matches {len(names)} layers of the base, not one; wrong base or wrong prefix")
    return names[0], suffixes[suffix]


def _settings(file: Path, form: Form, header: dict[str, str], owner: str) -> dict[str, Any]:
    """The peft settings that came with a module's tensors; empty if none did."""
    if form == "peft":
        beside = file.parent / "adapter_config.json"
        if not beside.is_file():
            raise ValueError(f"{beside}: missing, so the scale of {file.name} is unknown; copy the whole folder")
        return _json(beside, "adapter_config.json", beside.read_text())
    said = _json(file, "lora_adapter_metadata", header.get("lora_adapter_metadata", "{}"))
    return {key.removeprefix(f"{owner}."): value for key, value in said.items() if key.startswith(f"{owner}.")}


def _compare_base(file: Path, stored: str | None, base: str | None) -> None:
    if stored is not None and base is not None and stored != base:
        raise ValueError(f"{file}: t2i.base is {stored}, the base at hand is {base}; load it on its own base")


def _json(file: Path, key: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as broken:
        raise ValueError(f"{file}: {key} is not JSON ({broken}); export it again") from broken
    if not isinstance(value, dict):
        raise ValueError(f"{file}: {key} is a {type(value).__name__}, not an object; export it again")
    return value

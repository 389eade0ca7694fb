"""LoRA (Hu et al. 2021, arXiv:2106.09685) through peft: add, save with the scale folded in, load strictly, merge.

The scale is folded into B when a file is written, so that no loader can lose it. rsLoRA (arXiv:2312.03732), DoRA
(arXiv:2402.09353) and PiSSA (arXiv:2404.02948) are peft's; PiSSA moves part of the base into the adapter, so what is
saved is the difference to its start. LoHa and LoKr (lycoris.py) go the same way. PRX has no LoRA loader in diffusers; the adapter is a
peft folder (lora_files.py writes the other forms), and the merged weights are a stock transformer folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import peft
import torch
from torch import Tensor, nn

from models.networks.config import LoraConfig
from models.networks.denoiser import Denoiser
from models.personalization import lora_files, lora_import
from models.personalization.int8 import quantise
from models.personalization.lora_files import Adapter


def add_lora(denoiser: Denoiser, config: LoraConfig, seed: int) -> None:
    """Freeze the denoiser and put fresh adapters on the target layers: of zero effect, but for PiSSA's rounding."""
    check_targets(denoiser.transformer, config)
    denoiser.requires_grad_(False)
    if config.base == "int8":
        quantise(denoiser.transformer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(peft_settings(config), denoiser.transformer)


def peft_settings(config: LoraConfig) -> peft.PeftConfig:
    """peft's own configuration; where only a rank differs, its alpha follows, so that the scale stays."""
    scale = 1.0 if config.alpha is None else config.alpha / config.rank
    alphas = {name: scale * rank for name, rank in config.rank_pattern.items()} | config.alpha_pattern
    if config.kind in ("loha", "lokr"):
        family = peft.LoHaConfig if config.kind == "loha" else peft.LoKrConfig
        return family(r=config.rank, alpha=scale * config.rank, target_modules=list(config.targets),
                      rank_pattern=dict(config.rank_pattern), alpha_pattern=alphas)  # fmt: skip
    init: bool | str = True if config.init == "zero" else config.init
    return peft.LoraConfig(
        r=config.rank, lora_alpha=scale * config.rank, target_modules=list(config.targets), init_lora_weights=init,
        rank_pattern=dict(config.rank_pattern), alpha_pattern=alphas, use_rslora=config.kind == "rslora",
        use_dora=config.kind == "dora",
    )  # fmt: skip


def check_targets(module: nn.Module, config: LoraConfig) -> None:
    """Refuse targets and patterns that match no layer and ranks above a target layer's smaller side."""
    layers = lora_files.linear_sides(module)
    chosen: dict[str, tuple[int, int]] = {}
    for target in config.targets:
        found = {n: sides for n, sides in layers.items() if f".{n}".endswith(f".{target}")}
        if not found:
            names = sorted({".".join(n.split(".")[-2 if n[-1].isdigit() else -1 :]) for n in layers})
            raise ValueError(f"lora.targets: {target!r} matches no linear layer; there are {', '.join(names)}")
        chosen |= found
    for key in (*config.rank_pattern, *config.alpha_pattern):
        if not any(_fits(key, name) for name in chosen):
            raise ValueError(f"lora pattern {key!r} matches no target layer, such as {min(chosen)}; correct its name")
    for name, sides in sorted(chosen.items(), key=lambda item: min(item[1])):
        own: str | None = next((key for key in config.rank_pattern if _fits(key, name)), None)
        rank, field = (config.rank, "rank") if own is None else (config.rank_pattern[own], f"rank_pattern.{own}")
        if rank > min(sides):
            raise ValueError(
                f"lora.{field}={rank} exceeds the smaller side of {name}, {sides[1]} to {sides[0]}; "
                f"lower the rank to {min(sides)}"
            )


def _fits(key: str, layer: str) -> bool:
    """Whether peft takes a pattern's key for a layer."""
    return re.match(rf"(.*\.)?({key})$", layer) is not None


def since(adapter: Adapter, start: Adapter) -> Adapter:
    """What training added to an adapter that did not start at zero (PiSSA), for the untouched base; twice the rank."""
    layers = {}
    for name, (a, b) in adapter.layers.items():
        a_0, b_0 = start.layers[name]
        layers[name] = (torch.cat([a, a_0]), torch.cat([b, -b_0], 1))
    return Adapter(layers, adapter.about)


def stacked(before: Adapter, after: Adapter) -> Adapter:
    """Two adapters trained one after the other as one for the first one's base; ranks add up."""
    if before.magnitudes or after.magnitudes:
        raise ValueError("DoRA measures the rows of its own base; only plain adapters can be stacked")
    layers = dict(before.layers)
    for name, (a, b) in after.layers.items():
        held = layers.get(name)
        layers[name] = (a, b) if held is None else (torch.cat([held[0], a]), torch.cat([held[1], b], 1))
    return Adapter(layers, before.about)


def save_adapter(denoiser: Denoiser, folder: Path, metadata: dict[str, str], start: Adapter | None = None) -> None:
    """Write a peft folder; `metadata` may name the `base` (its digest) and the `trigger`, `start` is PiSSA's adapter."""
    adapter = lora_files.from_module(denoiser.transformer, metadata)
    lora_files.save_peft(adapter if start is None else since(adapter, start), folder)


def save_forms(adapter: Adapter, folder: Path, name: str, architecture: str = "prx") -> None:
    """The forms of an adapter in one folder: peft, diffusers (not of LoHa and LoKr), and NAME-kohya.safetensors."""
    lora_files.save_peft(adapter, folder)
    if not adapter.products:
        lora_files.save_diffusers(adapter, folder)
    prefix = "lora_transformer_" if architecture == "sd3" else "lora_unet_"  # what ComfyUI maps to each
    lora_files.save_kohya(adapter, folder / f"{name}-kohya.safetensors", architecture, prefix)


def load_adapter(denoiser: Denoiser, path: Path, base: str | None = None) -> None:
    """Put a saved adapter of any form on its base, whose digest is compared; rank and scale come from the file."""
    lora_import.load(denoiser.transformer, path, base)


def merge(denoiser: Denoiser, base: Denoiser | None = None) -> Denoiser:
    """A denoiser whose stock weights, or those of `base`, include the adapter's; the adapter layers are gone."""
    adapter, base = lora_files.from_module(denoiser.transformer, {}), base or denoiser
    weights = lora_files.stock_weights(base.transformer)
    return with_changes(base, {n: adapter.change(n, weights[f"{n}.weight"]) for n in adapter.layers})


def with_changes(denoiser: Denoiser, changes: Mapping[str, Tensor]) -> Denoiser:
    """A copy of the stock denoiser with a change [O, I] added to the weight of each named layer."""
    net = denoiser.transformer
    weights = lora_files.stock_weights(net)
    weights |= {f"{layer}.weight": weights[f"{layer}.weight"] + change for layer, change in changes.items()}
    merged = type(net).from_config(net.config)
    merged.load_state_dict(weights)
    return denoiser.around(merged.to(denoiser.device))

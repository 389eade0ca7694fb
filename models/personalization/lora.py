"""LoRA (Hu et al. 2021, arXiv:2106.09685) through peft: add, save with the scale folded in, load strictly, merge.

alpha = rank always, so the scale is 1 and no loader can lose it. PRX has no LoRA loader in diffusers; the adapter is a
peft folder (lora_files.py writes the other forms), and the merged weights are a stock transformer folder.
"""

from __future__ import annotations

from pathlib import Path

import peft
import torch
from diffusers.models.transformers.transformer_prx import PRXTransformer2DModel
from torch import nn

from models.networks.prx import Denoiser
from models.personalization import lora_files, lora_import
from models.personalization.config import LoraConfig


def add_lora(denoiser: Denoiser, config: LoraConfig, seed: int) -> None:
    """Freeze the denoiser and put fresh adapters (zero effect) on the target layers."""
    check_targets(denoiser.transformer, config)
    denoiser.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        settings = peft.LoraConfig(r=config.rank, lora_alpha=config.rank, target_modules=list(config.targets))
        peft.inject_adapter_in_model(settings, denoiser.transformer)


def check_targets(module: nn.Module, config: LoraConfig) -> None:
    """Refuse targets that match no linear layer and a rank above a target layer's smaller side."""
    layers = lora_files.linear_sides(module)
    chosen: dict[str, tuple[int, int]] = {}
    for target in config.targets:
        found = {n: sides for n, sides in layers.items() if f".{n}".endswith(f".{target}")}
        if not found:
            names = sorted({".".join(n.split(".")[-2 if n[-1].isdigit() else -1 :]) for n in layers})
            raise ValueError(f"lora.targets: {target!r} matches no linear layer; there are {', '.join(names)}")
        chosen |= found
    name, sides = min(chosen.items(), key=lambda item: min(item[1]))
    if config.rank > min(sides):
        raise ValueError(
            f"lora.rank={config.rank} exceeds the smaller side of {name}, {sides[1]} to {sides[0]}; "
            f"lower the rank to {min(sides)}"
        )


def save_adapter(denoiser: Denoiser, folder: Path, metadata: dict[str, str]) -> None:
    """Write a peft folder; `metadata` may name the `base` (its digest) and the `trigger`."""
    lora_files.save_peft(lora_files.from_module(denoiser.transformer, metadata), folder)


def load_adapter(denoiser: Denoiser, path: Path, base: str | None = None) -> None:
    """Put a saved adapter of any form on its base, whose digest is compared; rank and scale come from the file."""
    lora_import.load(denoiser.transformer, path, base)


def merge(denoiser: Denoiser) -> Denoiser:
    """A denoiser whose stock weights include the adapter's; the adapter layers are gone."""
    net = denoiser.transformer
    merged = PRXTransformer2DModel.from_config(net.config)
    state = {}
    modules = dict(net.named_modules())
    for name, parameter in net.state_dict().items():
        if ".lora_" in name:
            continue
        if ".base_layer." in name:
            owner = name.rsplit(".base_layer.", 1)[0]
            delta = modules[owner].get_delta_weight("default") if name.endswith("weight") else 0.0
            state[name.replace(".base_layer.", ".")] = parameter + delta
        else:
            state[name] = parameter
    merged.load_state_dict(state)
    return Denoiser(merged, denoiser.text_mean, denoiser.text_std)

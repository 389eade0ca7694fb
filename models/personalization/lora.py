"""LoRA (Hu et al. 2021, arXiv:2106.09685) through peft: add, save with the scale folded in, load strictly, merge.

alpha = rank always, so the scale is 1 and no loader can lose it. PRX has no LoRA loader in diffusers; the adapter is a
peft folder, and the merged weights are a stock transformer folder.
"""

from __future__ import annotations

import json
from pathlib import Path

import peft
import torch
from diffusers.models.transformers.transformer_prx import PRXTransformer2DModel
from safetensors.torch import load_file, save_file

from models.networks.prx import Denoiser
from models.personalization.config import LoraConfig


def add_lora(denoiser: Denoiser, config: LoraConfig, seed: int) -> None:
    """Freeze the denoiser and put fresh adapters (zero effect) on the target layers."""
    denoiser.requires_grad_(False)
    largest = min(denoiser.transformer.hidden_size, denoiser.transformer.config.context_in_dim)
    if config.rank > largest:
        raise ValueError(f"lora.rank={config.rank} exceeds the layers' smallest side {largest}; lower the rank")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        settings = peft.LoraConfig(r=config.rank, lora_alpha=config.rank, target_modules=list(config.targets))
        peft.inject_adapter_in_model(settings, denoiser.transformer)


def adapter_tensors(denoiser: Denoiser) -> dict[str, torch.Tensor]:
    """The adapter's tensors by peft name; an error when there are none."""
    state = {n: p.detach() for n, p in denoiser.transformer.named_parameters() if ".lora_" in n}
    if not state:
        raise ValueError("the denoiser has no adapter; call add_lora first")
    return {name.replace(".default", ""): value.contiguous() for name, value in state.items()}


def save_adapter(denoiser: Denoiser, config: LoraConfig, folder: Path, metadata: dict[str, str]) -> None:
    """Write adapter_model.safetensors (scale folded in: alpha = rank) and adapter_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {"t2i": json.dumps(metadata, sort_keys=True)}  # one key: safetensors writes several in random order
    save_file(adapter_tensors(denoiser), folder / "adapter_model.safetensors", metadata=about)
    settings = {
        "peft_type": "LORA", "r": config.rank, "lora_alpha": config.rank, "target_modules": list(config.targets),
        "inference_mode": True, "bias": "none", "lora_dropout": 0.0,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True))


def load_adapter(denoiser: Denoiser, config: LoraConfig, folder: Path) -> None:
    """Put a saved adapter on a base; every key must match both ways, be finite and have the right shape."""
    add_lora(denoiser, config, seed=0)
    stored = load_file(folder / "adapter_model.safetensors")
    wanted = {n.replace(".default", ""): p for n, p in denoiser.transformer.named_parameters() if ".lora_" in n}
    if wrong := sorted(stored.keys() ^ wanted.keys()):
        raise ValueError(
            f"adapter {folder}: {len(wrong)} keys do not match the base, first {wrong[0]!r}; wrong base or targets"
        )
    for name, value in stored.items():
        if value.shape != wanted[name].shape or not bool(torch.isfinite(value).all()):
            raise ValueError(
                f"adapter {folder}: {name} has shape {tuple(value.shape)} or non-finite values; retrain it"
            )
        with torch.no_grad():
            wanted[name].copy_(value)


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

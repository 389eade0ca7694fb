"""LoRA files that load everywhere: peft, diffusers and kohya/ComfyUI forms out of one `Adapter`.

A layer's change of weight is s B A (Hu et al. 2021, arXiv:2106.09685), s = alpha / r or alpha / sqrt(r) (rsLoRA,
arXiv:2312.03732). DoRA (arXiv:2402.09353, eq. 5) gives each row of W + s B A the learned length m; kohya's key for m
is `.dora_scale` [O, 1]. Loaders disagree on where alpha is written, and stock loaders skip keys they do not know; so s
is folded into B (alpha = r in every form), and lora_import.py reads them strictly. LoHa and LoKr
(lycoris.py) keep their own matrices beside the LoRA that makes the same change. A LoRA on text encoders goes into diffusers' form alone.
Left out: convolutions; they are refused.

I, O: a layer's inputs and outputs; R: rank.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lycoris_utils import LycorisLayer
from safetensors.torch import save
from torch import Tensor, nn

from models.personalization import lycoris
from models.personalization.lycoris import Product, factored

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"
ROWS_FILE = "learned_embeds.safetensors"  # text_tuning.py: embeddings of a learnt word, beside an adapter
ADAPTER_PART = re.compile(r"\.(lora|lokr|hada)_")
KOHYA_PREFIXES = ("lora_transformer_", "lora_unet_")  # the first is what ComfyUI maps to diffusers' names of SD3 layers


@dataclass(frozen=True)
class Adapter:
    """Low-rank changes by layer name, the scale folded into B, and what the file says about itself (base, trigger)."""

    layers: dict[str, tuple[Tensor, Tensor]]  # A [R, I], B [O, R]
    about: dict[str, str]
    magnitudes: dict[str, Tensor] = field(default_factory=dict)  # DoRA's m [O]; of every layer or of none
    products: dict[str, Product] = field(
        default_factory=dict
    )  # LoHa's or LoKr's own matrices; of every layer or of none

    @classmethod
    def of_products(cls, products: dict[str, Product], about: dict[str, str]) -> Adapter:
        """A LoHa or LoKr with the LoRA of the same changes."""
        return cls({name: factored(each) for name, each in products.items()}, about, products=products)

    def change(self, layer: str, weight: Tensor) -> Tensor:
        """What the adapter adds to the base's weight [O, I] of a layer."""
        a, b = self.layers[layer]
        if layer not in self.magnitudes:
            return b @ a
        moved = weight + b @ a
        lengths: Tensor = self.magnitudes[layer] / torch.linalg.vector_norm(moved, dim=1)
        return lengths.unsqueeze(1) * moved - weight

    @property
    def ranks(self) -> dict[str, int]:
        return {name: a.shape[0] for name, (a, _) in sorted(self.layers.items())}

    def settings(self, targets: list[str] | str, escape: bool = False) -> dict[str, Any]:
        """peft.LoraConfig's arguments with alpha = rank in each layer; ranks other than the commonest as patterns."""
        counts = Counter(self.ranks.values())
        common = max(counts, key=lambda rank: (counts[rank], rank))
        odd = {"^" + (re.escape(n) if escape else n): r for n, r in self.ranks.items() if r != common}
        pattern = {"rank_pattern": odd, "alpha_pattern": dict(odd), "use_dora": bool(self.magnitudes)}
        return {"r": common, "lora_alpha": common, "target_modules": targets, "use_rslora": False} | pattern


def is_adapted(module: nn.Module) -> bool:
    """Whether peft layers are on it."""
    return any(isinstance(layer, LoraLayer | LycorisLayer) for layer in module.modules())


def linear_sides(module: nn.Module) -> dict[str, tuple[int, int]]:
    """(O, I) of every linear layer by its stock name, adapted or not."""
    found = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear) and ".lora_" not in n}
    return {name.removesuffix(".base_layer"): (m.out_features, m.in_features) for name, m in found.items()}


def stock_weights(module: nn.Module) -> dict[str, Tensor]:
    """The weights and buffers of a module under their stock names, the adapters left out, in main memory as adapters are."""
    state = {n: t.detach().cpu() for n, t in module.state_dict().items() if not ADAPTER_PART.search(n)}
    return {name.replace(".base_layer.", "."): value for name, value in state.items()}


def from_module(module: nn.Module, about: dict[str, str], name: str = "default") -> Adapter:
    """A copy of the adapter `name` of a module; float32, because small values of B vanish in half precision."""
    if products := lycoris.from_module(module, name):
        return Adapter.of_products(products, about)
    layers, magnitudes = {}, {}
    for path, layer in module.named_modules():
        if not isinstance(layer, LoraLayer) or name not in layer.r:
            continue
        plain = name in layer.lora_A and isinstance(layer.get_base_layer(), nn.Linear)
        if not plain or layer.lora_bias.get(name):
            raise ValueError(f"{path}: only LoRA and DoRA on linear layers have a file form here; not bias or others")
        a, b = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
        layers[path] = (a.float().cpu().clone(), layer.scaling[name] * b.float().cpu())
        if layer.use_dora.get(name):
            magnitudes[path] = layer.lora_magnitude_vector[name].weight.detach().float().cpu().clone()
    if not layers:
        raise ValueError(f"the module has no adapter {name!r}; call add_lora or peft.inject_adapter_in_model first")
    return Adapter(layers, about, magnitudes)


def save_peft(adapter: Adapter, folder: Path) -> None:
    """Write adapter_model.safetensors with the prefix peft asks for, and adapter_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PEFT_FILE).write_bytes(to_bytes(_named(adapter, "base_model.model."), _about(adapter)))
    fixed = {"peft_type": "LORA", "inference_mode": True, "bias": "none", "lora_dropout": 0.0}
    plain = adapter.settings(list(adapter.ranks)) | fixed
    settings = lycoris.settings(adapter.products) if adapter.products else plain
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True))


def save_diffusers(adapter: Adapter, folder: Path, text: Mapping[str, Adapter] = MappingProxyType({})) -> Path:
    """Write pytorch_lora_weights.safetensors for `pipeline.load_lora_weights(folder)`; `text` by text encoder."""
    if adapter.products:
        raise ValueError("diffusers loads no LoHa and no LoKr; save peft's or kohya's form, or merge the adapter")
    settings, tensors = dict[str, Any](), dict[str, Tensor]()
    for name, part in {"transformer": adapter, **text}.items():
        settings |= {f"{name}.{key}": value for key, value in part.settings(list(part.ranks)).items()}
        tensors |= _named(part, f"{name}.")
    header = {"format": "pt", "lora_adapter_metadata": json.dumps(settings, sort_keys=True)} | _about(adapter)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DIFFUSERS_FILE).write_bytes(to_bytes(tensors, header))
    return folder / DIFFUSERS_FILE


def save_kohya(adapter: Adapter, path: Path, architecture: str, prefix: str = KOHYA_PREFIXES[0]) -> None:
    """Write kohya's form (also ComfyUI's): down, up and `.alpha` per layer, ss_* and modelspec.* keys; no date."""
    tensors = {}
    for name, (a, b) in adapter.layers.items():
        key = prefix + name.replace(".", "_")
        if f"{key}.alpha" in tensors:
            raise ValueError(f"{key}: two layers share this kohya name; save the diffusers form instead")
        product = adapter.products.get(name)
        tensors[f"{key}.alpha"] = torch.tensor(float(a.shape[0] if product is None else product.rank))
        if product is not None:
            tensors |= {f"{key}.{part}": value for part, value in product.parts.items()}
            continue
        tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = a, b
        if name in adapter.magnitudes:
            tensors[f"{key}.dora_scale"] = adapter.magnitudes[name].unsqueeze(1)
    ranks = {each.rank for each in adapter.products.values()} or set(adapter.ranks.values())
    dim = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    network = "lycoris.kohya" if adapter.products else "networks.lora"
    header = {
        "format": "pt", "ss_network_module": network, "ss_network_dim": dim, "ss_network_alpha": dim,
        "ss_base_model_version": architecture, "ss_output_name": path.stem,
        "modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers", "modelspec.title": path.stem,
    }  # fmt: skip
    if trigger := adapter.about.get("trigger"):
        header["modelspec.trigger_phrase"] = trigger
    plain = to_bytes(tensors, {})
    header["sshs_model_hash"] = hashlib.sha256(plain[8 + int.from_bytes(plain[:8], "little") :]).hexdigest()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(to_bytes(tensors, header | _about(adapter)))


def attach(module: nn.Module, adapter: Adapter, name: str = "default") -> None:
    """Add peft layers that hold the adapter."""
    if any(isinstance(layer, LoraLayer) and name in layer.r for layer in module.modules()):
        raise ValueError(f"the module already has an adapter {name!r}; give this one another name")
    targets = "|".join(re.escape(layer) for layer in adapter.layers)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are what is wanted
        peft.inject_adapter_in_model(peft.LoraConfig(**adapter.settings(targets, escape=True)), module, name)
    modules = dict(module.named_modules())
    with torch.no_grad():
        for path, (a, b) in adapter.layers.items():
            modules[f"{path}.lora_A.{name}"].weight.copy_(a)
            modules[f"{path}.lora_B.{name}"].weight.copy_(b)
            if path in adapter.magnitudes:
                modules[f"{path}.lora_magnitude_vector.{name}"].weight.copy_(adapter.magnitudes[path])


def _named(adapter: Adapter, prefix: str) -> dict[str, Tensor]:
    if adapter.products:
        return {f"{prefix}{n}.{part}": t for n, each in adapter.products.items() for part, t in each.parts.items()}
    parts = {
        f"{n}.lora_{half}.weight": t for n, pair in adapter.layers.items() for half, t in zip("AB", pair, strict=True)
    }
    parts |= {f"{n}.lora_magnitude_vector": m for n, m in adapter.magnitudes.items()}
    return {prefix + name: tensor for name, tensor in parts.items()}


def _about(adapter: Adapter) -> dict[str, str]:
    return {"t2i": json.dumps(adapter.about, sort_keys=True)}


def to_bytes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file with its metadata in sorted order; the library writes several keys in random order."""
    raw: bytes = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header = {"__metadata__": dict(sorted(metadata.items()))} | header if metadata else header
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + raw[start:]

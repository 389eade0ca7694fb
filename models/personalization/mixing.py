"""Mixing adapters: exactly, on the changes of the weights they make, not on their factors.

The sum of k adapters is sum_i w_i dW_i. Adding their A and B instead, as some loaders do, makes cross terms B_1 A_2
that belong to nobody. `svd` keeps the best rank-r part of the sum (Eckart and Young 1936); `ties` trims, elects a sign
and averages those that agree (Yadav et al. 2023, arXiv:2306.01708, algorithm 1; trimmed per layer); `dare` drops
entries at random and rescales the rest (Yu et al. 2023, arXiv:2311.03099); `fused` fits each layer to its inputs (fusion.py). Each tells how far it is from the sum.
An adapter of weight 0 counts as absent. Left out: learned mixing weights.

K: adapters; I, O: a layer's inputs and outputs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import assert_never

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from models.personalization.config import MixMethod
from models.personalization.lora_files import Adapter

Changes = dict[str, Tensor]  # layer -> [O, I]


@dataclass(frozen=True)
class Part:
    """One adapter of a mix, how strongly it counts, and how strongly in single blocks (prefixes of layers' names)."""

    adapter: Adapter
    weight: float = 1.0
    blocks: Mapping[str, float] = field(default_factory=dict)

    def strength(self, layer: str) -> float:
        """Weight of one layer: the adapter's, times the factor of the longest prefix that fits."""
        fitting = [prefix for prefix in self.blocks if f"{layer}.".startswith(f"{prefix}.")]
        return self.weight * (self.blocks[max(fitting, key=len)] if fitting else 1.0)


@dataclass(frozen=True)
class Mix:
    """The mixed changes, and their relative distance to the exact sum: |mix - sum| / |sum|, Frobenius."""

    changes: Changes
    error: float
    error_by_layer: dict[str, float]


def mix(
    parts: Mapping[str, Part],
    base: Mapping[str, Tensor],
    method: MixMethod = "sum",
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
    fit: Callable[[str, Mapping[str, Tensor]], Tensor] | None = None,
) -> Mix:
    """Mix the changes of all parts; `base` are the stock weights, `density` is the share `ties` and `dare` keep.

    `fit` makes one layer's change from each adapter's for `fused` (fusion.py).
    """
    check(parts, density)
    total, mixed = Changes(), Changes()
    for layer, changes in weighted_changes(parts, base).items():
        stack = torch.stack(list(changes.values()))  # [K, O, I]
        total[layer] = added(stack)
        match method:
            case "sum":
                mixed[layer] = total[layer]
            case "svd":
                a, b = factors(total[layer], rank or min(total[layer].shape))
                mixed[layer] = b @ a
            case "ties":
                mixed[layer] = ties(stack, density)
            case "dare":
                mixed[layer] = added(dare(changes, layer, density, seed))
            case "fused" | "distilled":
                if fit is None:
                    raise ValueError(f"method {method} needs the inputs of the layers; give fit")
                mixed[layer] = fit(layer, changes)
            case _:
                assert_never(method)
    return compared(mixed, total)


def compared(mixed: Changes, total: Changes) -> Mix:
    """Mixed changes and their distance to the sum of the same layers."""
    errors = {layer: distance([mixed[layer]], [total[layer]]) for layer in total}
    return Mix(mixed, distance([mixed[layer] for layer in total], list(total.values())), errors)


def weighted_changes(parts: Mapping[str, Part], base: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Layer -> adapter -> w dW [O, I], of the adapters that count there."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, part in sorted(parts.items()):
        for layer in part.adapter.layers:
            if (strength := part.strength(layer)) != 0:
                change = strength * part.adapter.change(layer, base[f"{layer}.weight"])
                found.setdefault(layer, {})[name] = change
    return found


def added(stack: Tensor) -> Tensor:
    """Sum over the first dimension, the same to the bit in every order of it."""
    return stack.double().sort(0).values.sum(0).to(stack.dtype)


def factors(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [R, I] and B [O, R] of the nearest change of that rank."""
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    root = s[:rank].sqrt()
    return root.unsqueeze(1) * v[:rank], u[:, :rank] * root


def ties(stack: Tensor, density: float) -> Tensor:
    """Trim each change [K, O, I] to its largest entries, elect the sign with more mass, average those that have it."""
    k = stack.shape[0]
    sizes = stack.abs().view(k, -1)
    dropped = sizes.shape[1] - max(1, round(density * sizes.shape[1]))
    if dropped > 0:
        limit = sizes.kthvalue(dropped, dim=1).values.view(k, 1, 1)
        stack = torch.where(stack.abs() > limit, stack, 0.0)
    agrees = (stack != 0) & (stack.sign() == added(stack).sign())
    return added(torch.where(agrees, stack, 0.0)) / agrees.sum(0).clamp_min(1)


def dare(changes: Mapping[str, Tensor], layer: str, density: float, seed: int) -> Tensor:
    """Keep each entry with probability `density`, divided by it; what is kept depends on the adapter's name alone."""
    kept = []
    for name, change in changes.items():
        digest = hashlib.sha256(f"{seed}|{name}|{layer}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        kept.append(torch.where(torch.rand(change.shape, generator=generator) < density, change / density, 0.0))
    return torch.stack(kept)


def distance(mixed: list[Tensor], total: list[Tensor]) -> float:
    """Relative Frobenius distance of two lists of matrices; infinite where something stands for nothing."""
    off = math.sqrt(sum(float((m.double() - t.double()).square().sum()) for m, t in zip(mixed, total, strict=True)))
    size = math.sqrt(sum(float(t.double().square().sum()) for t in total))
    return off / size if size > 0 else (math.inf if off > 0 else 0.0)


def concatenated(parts: Mapping[str, Part], about: dict[str, str]) -> Adapter:
    """The exact sum as one LoRA: A stacked, w B side by side; the rank is the sum of the ranks."""
    check(parts, 1.0)
    pieces: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, part in sorted(parts.items()):
        if part.adapter.magnitudes:
            raise ValueError(f"adapter {name} is a DoRA, whose change has no low rank; merge it with method sum")
        for layer, (a, b) in part.adapter.layers.items():
            if (strength := part.strength(layer)) != 0:
                pieces.setdefault(layer, []).append((a, strength * b))
    layers = {n: (torch.cat([a for a, _ in found]), torch.cat([b for _, b in found], 1)) for n, found in pieces.items()}
    return Adapter(layers, about)


def reduced(changes: Changes, rank: int | Mapping[str, int], about: dict[str, str]) -> Adapter:
    """The best LoRA of one rank, or of one for each layer, for mixed changes."""
    ranks = dict.fromkeys(changes, rank) if isinstance(rank, int) else rank
    return Adapter({n: factors(change, min(ranks[n], *change.shape)) for n, change in changes.items()}, about)


def set_strengths(module: nn.Module, parts: Mapping[str, Part]) -> None:
    """Draw with the sum of the attached adapters `parts` names from now on; all others and weight 0 are off."""
    check(parts, 1.0)
    on = {name for name, part in parts.items() if part.weight != 0}
    for name in sorted(on):
        if parts[name].adapter.magnitudes and (len(on) > 1 or parts[name].weight != 1 or parts[name].blocks):
            raise ValueError(f"adapter {name} is a DoRA, which peft can only draw alone with weight 1; merge it by mix")
    layers = {path: layer for path, layer in module.named_modules() if isinstance(layer, LoraLayer)}
    for name in parts:
        if not any(name in layer.r for layer in layers.values()):
            there = sorted({known for layer in layers.values() for known in layer.r})
            raise ValueError(f"the module has no adapter {name!r}, only {there}; attach it first")
    for path, layer in layers.items():
        for name in on & layer.r.keys():
            layer.set_scale(name, parts[name].strength(path))
        layer.set_adapter(sorted(on & layer.r.keys()))


def check(parts: Mapping[str, Part], density: float) -> None:
    """Refuse what cannot be mixed, naming the adapter and the layer."""
    if not parts:
        raise ValueError("no adapters to mix; name at least one")
    if not 0 < density <= 1:
        raise ValueError(f"density={density} is not above 0 and at most 1; it is the share of entries kept")
    shapes: dict[str, tuple[str, tuple[int, int]]] = {}
    for name, part in parts.items():
        for prefix, factor in {"": part.weight, **part.blocks}.items():
            if not math.isfinite(factor):
                raise ValueError(f"weight {factor} of adapter {name} {prefix or 'as a whole'} is no number; correct it")
        for prefix in part.blocks:
            if not any(f"{layer}.".startswith(f"{prefix}.") for layer in part.adapter.layers):
                some = ", ".join(list(part.adapter.layers)[:3])
                raise ValueError(f"block {prefix!r} of adapter {name} fits none of its layers, such as {some}")
        for layer, (a, b) in part.adapter.layers.items():
            shape = (b.shape[0], a.shape[1])
            other, known = shapes.setdefault(layer, (name, shape))
            if known != shape:
                raise ValueError(f"{layer} is {known} in adapter {other}, {shape} in {name}; they are of other bases")

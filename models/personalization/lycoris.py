"""LoHa and LoKr: changes of weight that are products of small matrices (Yeh et al. 2023, arXiv:2309.14859, section 3).

    LoHa  dW = s (A_1 B_1) * (A_2 B_2)   elementwise; rank up to R^2 (FedPara, arXiv:2108.06098)
    LoKr  dW = s W_1 (x) W_2             Kronecker; W_2 = A_2 B_2 where R is below half its sides

peft trains them; s is folded in before a file is written. Merging, mixing and interference get them as the LoRA
that makes the same change (`factored`, of its exact rank). Their files are peft's folder and LyCORIS' keys in kohya's form;
diffusers loads neither. Left out: W_1 as a product, convolutions.

I, O: a layer's inputs and outputs; R: rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft.tuners.lycoris_utils import LycorisLayer
from torch import Tensor, nn

Kind = Literal["loha", "lokr"]
NEGLIGIBLE = 1e-7  # singular values below this share of the largest are rounding
PARTS: dict[Kind, tuple[frozenset[str], ...]] = {
    "loha": (frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),),
    "lokr": (frozenset({"lokr_w1", "lokr_w2"}), frozenset({"lokr_w1", "lokr_w2_a", "lokr_w2_b"})),
}
SCALED = {"loha": "hada_w2_b", "lokr": "lokr_w1"}  # what the scale is folded into


@dataclass(frozen=True)
class Product:
    """One layer's small matrices by peft's name, and the rank asked for."""

    kind: Kind
    rank: int
    parts: dict[str, Tensor]

    @property
    def change(self) -> Tensor:
        """What it adds to the weight [O, I]."""
        parts = self.parts
        if self.kind == "loha":
            return (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
        w_2 = parts["lokr_w2"] if "lokr_w2" in parts else parts["lokr_w2_a"] @ parts["lokr_w2_b"]
        return torch.kron(parts["lokr_w1"], w_2)


def from_module(module: nn.Module, name: str) -> dict[str, Product]:
    """Copies of the LoHa or LoKr matrices of adapter `name` by layer, float32; empty where there are none."""
    found = {}
    for path, layer in module.named_modules():
        if not isinstance(layer, LycorisLayer) or name not in layer.scaling:
            continue
        held = {n: getattr(layer, n)[name] for n in layer.adapter_layer_names if name in getattr(layer, n)}
        parts = {n: value.detach().float().cpu().clone() for n, value in held.items()}
        kind = kind_of(path, set(parts))
        parts[SCALED[kind]] *= layer.scaling[name]
        found[path] = Product(kind, int(layer.r[name]), parts)
    return found


def kind_of(layer: str, parts: set[str]) -> Kind:
    """LoHa or LoKr, by the names of the parts; refused where some are missing or too many."""
    for kind, sets in PARTS.items():
        if parts in sets:
            return kind
    raise ValueError(
        f"{layer}: {', '.join(sorted(parts))} are not the parts of one LoHa or LoKr; the file is incomplete"
    )


def checked(layer: str, product: Product, sides: tuple[int, int]) -> Product:
    """The product, if its matrices fit together and make a change of the layer's sides (O, I)."""
    shapes = {name: tuple(part.shape) for name, part in product.parts.items()}
    if any(len(shape) != 2 for shape in shapes.values()):
        raise ValueError(f"{layer}: {shapes} are not all matrices; convolutions are not read")
    pairs = [(n, n[:-1] + "b") for n in shapes if n.endswith("_a")]
    for a, b in pairs:
        if shapes[a][1] != shapes[b][0]:
            raise ValueError(f"{layer}: {a} {shapes[a]} and {b} {shapes[b]} do not fit; the file is damaged")
    if product.kind == "loha":
        made = {(shapes[a][0], shapes[b][1]) for a, b in pairs}
    else:
        right = shapes.get("lokr_w2") or (shapes["lokr_w2_a"][0], shapes["lokr_w2_b"][1])
        made = {(shapes["lokr_w1"][0] * right[0], shapes["lokr_w1"][1] * right[1])}
    if made != {sides}:
        raise ValueError(f"{layer}: {product.kind} makes {sorted(made)}, the layer is {sides}; it is of another base")
    return product


def factored(product: Product) -> tuple[Tensor, Tensor]:
    """A [R, I] and B [O, R] of the LoRA that makes the same change, of the least rank that does."""
    u, s, v = torch.linalg.svd(product.change.double(), full_matrices=False)
    rank = max(1, int((s > NEGLIGIBLE * s.max()).sum()))
    root = s[:rank].sqrt()
    return (root.unsqueeze(1) * v[:rank]).float(), (u[:, :rank] * root).float()


def settings(products: dict[str, Product]) -> dict[str, Any]:
    """peft's configuration for a file of them: alpha = rank, which is what the scale was folded in for."""
    kinds, ranks = {each.kind for each in products.values()}, {n: each.rank for n, each in products.items()}
    if len(kinds) != 1:
        raise ValueError("an adapter is LoHa or LoKr, not both; save them apart")
    common = max(ranks.values())
    odd = {f"^{n}": rank for n, rank in ranks.items() if rank != common}
    return {"peft_type": kinds.pop().upper(), "r": common, "alpha": common, "rank_pattern": odd, "alpha_pattern": dict(odd),
            "target_modules": sorted(products), "inference_mode": True}  # fmt: skip

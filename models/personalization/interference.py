"""How much two adapters get in each other's way, before they are mixed: from their weights alone.

Cosine of the changes and overlap of the subspaces they write to (columns of B) and read from (rows of A), as projection
metrics |U_1^T U_2|^2 / min(r_1, r_2), 1 = one holds the other. Two random subspaces overlap by max(r_1, r_2) / side.
That two adapters are orthogonal does not make their concepts compose (arXiv:2510.03262): evaluate the mix too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from models.personalization.lora_files import Adapter

NEGLIGIBLE = 1e-6  # singular values below this share of the largest are rounding


@dataclass(frozen=True)
class Interference:
    """Of two adapters: over all layers the cosine and norms, averaged over shared layers the rest."""

    shared_layers: int
    cosine: float  # of the changes, all layers as one vector
    output_overlap: float  # 0..1, where they write
    input_overlap: float  # 0..1, what they read
    output_chance: float  # overlap of random subspaces
    input_chance: float
    sign_conflict: float  # share of the common mass with opposite signs; .5 = unrelated
    norm_ratio: float  # first / second


def interference(one: Adapter, two: Adapter) -> Interference:
    """Compare two adapters of one base; DoRA's magnitudes are not looked at."""
    shared = [layer for layer in one.layers if layer in two.layers]
    means = torch.zeros(4, dtype=torch.float64)
    dot = common = conflict = 0.0
    for layer in shared:
        (a_1, b_1), (a_2, b_2) = one.layers[layer], two.layers[layer]
        change_1, change_2 = b_1 @ a_1, b_2 @ a_2
        dot += float((change_1 * change_2).sum())
        smaller = torch.minimum(change_1.abs(), change_2.abs())
        common += float(smaller.sum())
        conflict += float(smaller[change_1 * change_2 < 0].sum())
        (u_1, v_1), (u_2, v_2) = subspaces(a_1, b_1), subspaces(a_2, b_2)
        rank = max(u_1.shape[1], u_2.shape[1])
        means += torch.tensor([overlap(u_1, u_2), overlap(v_1, v_2), rank / b_1.shape[0], rank / a_1.shape[1]])
    outputs, inputs, chance_out, chance_in = (means / max(1, len(shared))).tolist()
    norm_1, norm_2 = norm(one), norm(two)
    cosine = dot / (norm_1 * norm_2) if norm_1 * norm_2 > 0 else 0.0
    return Interference(
        len(shared), cosine, outputs, inputs, chance_out, chance_in, conflict / common if common > 0 else 0.0,
        norm_1 / norm_2 if norm_2 > 0 else float("inf"),
    )  # fmt: skip


def norm(adapter: Adapter) -> float:
    """Frobenius norm of all changes together."""
    return math.sqrt(sum(float((b @ a).double().square().sum()) for a, b in adapter.layers.values()))


def subspaces(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal bases [O, r] and [I, r] of what B A writes to and reads from; r leaves out negligible directions."""
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T)
    rank = int((s > NEGLIGIBLE * s.max()).sum()) if bool(s.any()) else 0
    return q_b @ u[:, :rank], q_a @ v[:rank].T


def overlap(one: Tensor, two: Tensor) -> float:
    """|U_1^T U_2|^2 / min(r_1, r_2) of orthonormal bases."""
    rank = min(one.shape[1], two.shape[1])
    return float((one.T @ two).square().sum()) / rank if rank else 0.0

"""What a reward model learns from captioned pictures alone: which picture belongs to which prompt, and what is broken.

ImageReward (arXiv:2304.05977, sec. 3) and PickScore (arXiv:2305.01569, sec. 4) start from BLIP and CLIP, whose training
this stands for at small size: InfoNCE in both directions (arXiv:2103.00020, fig. 3) over curated pictures and over the
compared ones, and pairs that need no judge, a curated picture against itself spoilt. Pictures here are in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F

from models.evaluation import corruptions as corrupt

NEVER = -1e4  # logit of a caption that says the same as the right one
REACH = 2  # pixels


def info_nce(logits: torch.Tensor, caption: torch.Tensor) -> torch.Tensor:
    """Mean of both directions over scores [B, B] of pictures (rows) under prompts; equal numbers in `caption` [B] are no foes."""
    size = len(logits)
    twins = (caption[:, None] == caption) & ~torch.eye(size, dtype=torch.bool, device=logits.device)
    logits, right = logits.masked_fill(twins, NEVER), torch.arange(size, device=logits.device)
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2


def varied(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The pictures with changes that make them neither right nor wrong: moved by up to two pixels, mild blur, noise."""
    device, pictures = pictures.device, pictures.cpu()  # where the generator is
    b, _, h, w = pictures.shape
    moves = torch.randint(-REACH, REACH + 1, (2, b, 1, 1), generator=generator)
    rows, columns = torch.arange(h).view(1, h, 1), torch.arange(w).view(1, 1, w)
    moved = corrupt.gather_pixels(pictures, rows + moves[0] + 0 * columns, columns + moves[1] + 0 * rows)
    moved = corrupt.gaussian_blur(moved, corrupt.uniform(0.01, 0.5, (b,), generator))
    noise = torch.randn(moved.shape, generator=generator) * corrupt.uniform(0, 0.1, (b, 1, 1, 1), generator)
    return (moved + noise).clamp(-1, 1).to(device)


def spoilt(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Every picture broken: a quarter shines through another one, the rest shuffled, displaced, coarse, warped or blurred."""
    device, pictures = pictures.device, pictures.cpu()  # where the generator is
    ghosts = max(1, len(pictures) // 4)
    away = int(torch.randint(1, max(2, len(pictures)), (1,), generator=generator))  # never the picture itself
    others = pictures.roll(away, 0)[:ghosts]
    share = corrupt.uniform(0.3, 0.7, (ghosts,), generator)
    broken = [corrupt.blend(pictures[:ghosts] / 2 + 0.5, others / 2 + 0.5, share) * 2 - 1]
    kinds: list[Callable[[torch.Tensor], torch.Tensor]] = [
        *(partial(corrupt.shuffle_patches, patch=patch, generator=generator) for patch in (2, 4, 4, 8)),
        *(partial(corrupt.displace_patches, patch=patch, reach=reach, generator=generator)
          for patch, reach in ((2, 2), (4, 2), (4, 3), (8, 3))),
        *(partial(corrupt.coarsen, factor=factor, smooth=smooth) for factor in (2, 4) for smooth in (True, False)),
        partial(corrupt.wobble, amplitude=1.6, cells=7, generator=generator),
        lambda x: corrupt.gaussian_blur(x, corrupt.uniform(1.0, 2.5, (len(x),), generator)),
    ]  # fmt: skip
    start = int(torch.randint(len(kinds), (1,), generator=generator))
    for place, part in enumerate(torch.tensor_split(pictures[ghosts:], len(kinds))):
        if len(part):
            broken.append(kinds[(start + place) % len(kinds)](part))
    return torch.cat(broken).to(device)

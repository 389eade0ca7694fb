"""What a reward model learns from captioned pictures alone: which picture belongs to which prompt, and what is broken.

ImageReward (arXiv:2304.05977, sec. 3) and PickScore (arXiv:2305.01569, sec. 4) start from BLIP and CLIP, whose training
this stands for at small size: InfoNCE in both directions (arXiv:2103.00020, fig. 3) over curated pictures and over the
compared ones, and pairs that need no judge, a curated picture against itself spoilt. Pictures here are in [-1, 1].
Chance foes differ in everything; with neighbours (NegCLIP, arXiv:2210.01936, sec. 4) half of a batch asks nearly the same
as the other half, so that object, place and background must be told apart one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional as F

from models.evaluation import corruptions as corrupt

NEVER = -1e4  # logit of a caption that says the same as the right one
REACH = 2  # pixels
LEAST_STD = 1e-3
ROWS = 512  # captions compared with all others at a time


def info_nce(logits: torch.Tensor, caption: torch.Tensor) -> torch.Tensor:
    """Mean of both directions over scores [B, B] of pictures (rows) under prompts; equal numbers in `caption` [B] are no foes."""
    size = len(logits)
    twins = (caption[:, None] == caption) & ~torch.eye(size, dtype=torch.bool, device=logits.device)
    logits, right = logits.masked_fill(twins, NEVER), torch.arange(size, device=logits.device)
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2


@dataclass(frozen=True)
class Neighbours:
    """Pictures whose captions are near each other's."""

    caption: torch.Tensor  # [M], number of each picture's caption, 0 to C - 1
    near: torch.Tensor  # [C, K], the captions nearest to each, itself left out
    order: torch.Tensor  # [M], pictures by caption
    start: torch.Tensor  # [C + 1], where a caption's pictures start in `order`

    @classmethod
    def of(cls, short: torch.Tensor, text: torch.Tensor, count: int) -> Neighbours:
        """Of pictures with captions `short` [M], rows of `text` [N, D]; at most as many as there are other captions."""
        used, caption = torch.unique(short, return_inverse=True)
        if len(used) < 2:
            raise ValueError(f"pictures of {len(used)} caption have no near others; set reward_model.near to 0")
        features = text[used]
        scaled = F.normalize((features - features.mean(0)) / features.std(0).clamp_min(LEAST_STD), dim=1)
        alike = [part @ scaled.T for part in scaled.split(ROWS)]
        most = min(count + 1, len(used))
        near = torch.cat([part.topk(most, dim=1).indices for part in alike])
        own = torch.arange(len(used))[:, None]
        others = near.where(near != own, near[:, -1:])[:, :-1]  # a twin may stand before the caption itself
        sizes = torch.bincount(caption, minlength=len(used))
        return cls(caption, others, caption.argsort(stable=True), torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]))

    def beside(self, pictures: torch.Tensor, chance: torch.Tensor) -> torch.Tensor:
        """For each picture [B] one of a near caption; `chance` [B, 2] uniform in [0, 1) says which caption and picture."""
        near = self.near[self.caption[pictures]]
        asked = near.gather(1, (chance[:, :1] * near.shape[1]).long())[:, 0]
        count = self.start[asked + 1] - self.start[asked]
        return self.order[self.start[asked] + (chance[:, 1] * count).long()]


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

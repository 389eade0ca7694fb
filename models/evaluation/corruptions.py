"""Pictures a judge must refuse: right colours at about the right place, but no shape.

A judge trained on clean renders alone gives 69 % to renders whose pixels are shuffled inside every 4x4 patch, so these
are its negatives. All functions take and give float pictures in 0..1, [B, C, H, W], and draw from the passed generator.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def uniform(low: float, high: float, size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform random numbers in low..high."""
    return torch.rand(size, generator=generator) * (high - low) + low


def gather_pixels(pictures: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Pictures whose pixel (y, x) is read at (rows[b, y, x], columns[b, y, x]), clamped at the border."""
    b, c, h, w = pictures.shape
    flat = rows.clamp(0, h - 1) * w + columns.clamp(0, w - 1)  # [B, H, W]
    return pictures.flatten(2).gather(2, flat.view(b, 1, h * w).expand(b, c, h * w)).view(b, c, h, w)


def shuffle_patches(pictures: Tensor, patch: int, generator: torch.Generator) -> Tensor:
    """Pixels permuted at random inside every patch x patch square, each square on its own."""
    b, c, h, w = pictures.shape
    rows, columns = h // patch, w // patch
    tiles = pictures.view(b, c, rows, patch, columns, patch).permute(0, 1, 2, 4, 3, 5).reshape(b, c, rows * columns, -1)
    order = torch.rand((b, 1, rows * columns, patch * patch), generator=generator).argsort(-1).expand(b, c, -1, -1)
    tiles = tiles.gather(3, order).view(b, c, rows, columns, patch, patch)
    return tiles.permute(0, 1, 2, 4, 3, 5).reshape(b, c, h, w)


def displace_patches(pictures: Tensor, patch: int, reach: int, generator: torch.Generator) -> Tensor:
    """Every patch x patch square shows what lies up to `reach` pixels away, each square on its own."""
    b, _, h, w = pictures.shape
    offsets = torch.randint(-reach, reach + 1, (2, b, h // patch, w // patch), generator=generator)
    offsets = offsets.repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    return gather_pixels(pictures, torch.arange(h).view(1, h, 1) + offsets[0], torch.arange(w) + offsets[1])


def coarsen(pictures: Tensor, factor: int, smooth: bool) -> Tensor:
    """Pictures averaged over factor x factor squares and brought back to size (bilinear, or as blocks)."""
    small = F.avg_pool2d(pictures, factor)
    if smooth:
        return F.interpolate(small, scale_factor=factor, mode="bilinear", align_corners=False)
    return F.interpolate(small, scale_factor=factor, mode="nearest")


def gaussian_blur(pictures: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur with one sigma per picture [B], in pixels."""
    _, _, h, w = pictures.shape

    def blurring(size: int) -> Tensor:  # [B, 1, size, size], rows sum to one
        distance = torch.arange(size).view(size, 1) - torch.arange(size)
        weights = torch.exp(-0.5 * (distance / sigma.clamp(min=1e-2).view(-1, 1, 1)) ** 2)
        return (weights / weights.sum(2, keepdim=True))[:, None]

    down = blurring(h)
    return down @ pictures @ (down if h == w else blurring(w)).transpose(2, 3)


def border_shade(pictures: Tensor) -> Tensor:
    """The background's colour [B, C, 1, 1]: the median along the picture's edge."""
    edge = torch.cat([pictures[:, :, 0], pictures[:, :, -1], pictures[:, :, :, 0], pictures[:, :, :, -1]], dim=2)
    return edge.median(dim=2).values[:, :, None, None]


def join_halves(first: Tensor, second: Tensor, cut: Tensor, sideways: Tensor, softness: Tensor) -> Tensor:
    """`first` up to the cut (rows, or columns where `sideways`) and `second` after it, on first's background shade.

    Two renders of the same layout and background but other objects, joined so, show half objects and no other seam.
    """
    b, _, h, w = first.shape
    second = (second + border_shade(first) - border_shade(second)).clamp(0, 1)
    at = torch.where(sideways.view(b, 1, 1), torch.arange(w).view(1, 1, w), torch.arange(h).view(1, h, 1))
    mask = torch.sigmoid((at + 0.5 - cut.view(b, 1, 1)) / softness.view(b, 1, 1))[:, None]
    return first * (1 - mask) + second * mask


def blend(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """A ghost: both pictures shine through each other."""
    second = (second + border_shade(first) - border_shade(second)).clamp(0, 1)
    return torch.lerp(first, second, share.view(-1, 1, 1, 1))


def wobble(pictures: Tensor, amplitude: float, cells: int, generator: torch.Generator) -> Tensor:
    """A smooth random warp of about `amplitude` pixels with `cells` control points a side."""
    b, _, h, w = pictures.shape
    field = torch.randn((b, 2, cells, cells), generator=generator) * amplitude
    field = F.interpolate(field, size=(h, w), mode="bicubic", align_corners=True)
    rows = (torch.arange(h).view(1, h, 1) + field[:, 0]) * 2 / (h - 1) - 1
    columns = (torch.arange(w) + field[:, 1]) * 2 / (w - 1) - 1
    grid = torch.stack([columns.expand(b, h, w), rows.expand(b, h, w)], dim=3)
    return F.grid_sample(pictures, grid, padding_mode="border", align_corners=True)

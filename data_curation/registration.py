"""Is one picture a copy of another? Lucas-Kanade registration (1981) with scale, shift and one brightness gain.

A perceptual hash only nominates: it cannot tell a cropped copy from the same motif drawn again. A copy becomes equal
under a small crop and a brightness change; another drawing does not, or only with a tilt, which `shear` measures.
Left out: rotated and mirrored copies, overlays.

Shapes: P pairs, K x K thumbnail, 3 colours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 48
BLUR = 1.0  # px of the thumbnail; alignment needs slopes, not edges
STEPS = 6
MAX_MOVE = 0.06  # of the picture's side: the largest crop we undo
SATURATED = 244
MARGIN = 2
BATCH = 64
COARSE = 12  # px; a first look that costs little
MAX_COARSE, MAX_COARSE_RELATIVE = 16.0, 0.5  # its greatest difference, grey levels and over the slopes

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Agreement:
    """How well two pictures agree once registered, one value a pair."""

    residual: Floats  # rms difference, grey levels
    relative: Floats  # the same over the rms slope of the first picture
    tint: Floats  # largest median difference of a colour channel, grey levels: a flat area keeps its colour in a copy
    move: Floats  # what was undone, [P, 4]: scale x, scale y, shift x, shift y, share of the side


def thumbnail(picture: Image.Image) -> NDArray[np.uint8]:
    """What registration looks at, [K, K, 3]."""
    return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.HAMMING))


def register(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> Agreement:
    """Align each second thumbnail [P, K, K, 3] to its first."""
    parts = [_register(_soft(first[i : i + BATCH]), _soft(second[i : i + BATCH])) for i in range(0, len(first), BATCH)]
    if not parts:
        none = np.empty(0, np.float32)
        return Agreement(none, none, none, np.empty((0, 4), np.float32))
    return Agreement(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def shear(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> Floats:
    """How far each pair asks for a tilt or shear on top of scale and shift: the larger of the two, share of the side."""
    parts = [_shear(_soft(first[i : i + BATCH]), _soft(second[i : i + BATCH])) for i in range(0, len(first), BATCH)]
    return np.concatenate([np.empty(0, np.float32), *parts])


def plausible(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which pairs are alike enough at 12 x 12 px to be worth registering."""
    a, b = _coarse(first), _coarse(second)
    top, bottom = (a * b).sum(axis=(1, 2, 3)), np.maximum((b * b).sum(axis=(1, 2, 3)), 1)
    difference = np.sqrt(((a - np.clip(top / bottom, 0.8, 1.25)[:, None, None, None] * b) ** 2).mean(axis=(1, 2, 3)))
    slopes = sum((np.gradient(a, axis=axis) ** 2).mean(axis=(1, 2, 3)) for axis in (1, 2))
    near: NDArray[np.bool_] = difference < np.minimum(
        MAX_COARSE, MAX_COARSE_RELATIVE * np.maximum(np.sqrt(slopes), 0.5)
    )
    return near


def _coarse(thumbnails: NDArray[np.uint8]) -> Floats:
    step = SIDE // COARSE
    blocks = thumbnails.reshape(len(thumbnails), COARSE, step, COARSE, step, 3)
    return np.asarray(blocks.mean(axis=(2, 4), dtype=np.float32))


def _register(a: Floats, b: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    pairs = len(a)
    move = np.zeros((pairs, 4), np.float32)  # scale x, scale y, shift x, shift y
    best, best_move, tint = np.full(pairs, np.inf, np.float32), move, np.zeros(pairs, np.float32)
    for step in range(STEPS + 1):
        warped = _warp(b, move)
        gain, difference = _difference(a, warped)
        inner = difference[:, MARGIN:-MARGIN, MARGIN:-MARGIN]
        rms = np.sqrt((inner**2).mean(axis=(1, 2, 3)))
        best_move = np.where((rms < best)[:, None], move, best_move)
        tint = np.where(rms < best, np.abs(np.median(inner, axis=(1, 2))).max(axis=1), tint)
        best = np.minimum(best, rms)
        if step < STEPS:
            slopes = _slopes(warped * gain)[:, :, MARGIN:-MARGIN, MARGIN:-MARGIN].reshape(pairs, 4, -1)
            normal = slopes @ slopes.transpose(0, 2, 1)
            normal += np.eye(4, dtype=np.float32) * (1 + 1e-4 * normal.diagonal(axis1=1, axis2=2)[:, None])
            change = np.linalg.solve(normal, slopes @ inner.reshape(pairs, -1, 1))[..., 0]
            move = np.clip(move + change, -MAX_MOVE, MAX_MOVE)
    slope_x, slope_y = np.gradient(a, axis=2), np.gradient(a, axis=1)
    slope = np.sqrt((slope_x**2 + slope_y**2).mean(axis=(1, 2, 3)))
    return best, best / np.maximum(slope, 0.3), tint, best_move


def _shear(a: Floats, b: Floats) -> Floats:
    """The same fit with six parameters, gathered pixel by pixel because a sheared grid is no product of two axes."""
    pairs = len(a)
    move = np.zeros((pairs, 6), np.float32)  # as above, then y into x and x into y
    best, best_move = np.full(pairs, np.inf, np.float32), move
    for step in range(STEPS + 1):
        warped = _sheared(b, move)
        gain, difference = _difference(a, warped)
        inner = difference[:, MARGIN:-MARGIN, MARGIN:-MARGIN]
        rms = np.sqrt((inner**2).mean(axis=(1, 2, 3)))
        best_move = np.where((rms < best)[:, None], move, best_move)
        best = np.minimum(best, rms)
        if step < STEPS:
            slopes = _slopes(warped * gain, sheared=True)[:, :, MARGIN:-MARGIN, MARGIN:-MARGIN].reshape(pairs, 6, -1)
            normal = slopes @ slopes.transpose(0, 2, 1)
            normal += np.eye(6, dtype=np.float32) * (1 + 1e-4 * normal.diagonal(axis1=1, axis2=2)[:, None])
            change = np.linalg.solve(normal, slopes @ inner.reshape(pairs, -1, 1))[..., 0]
            move = np.clip(move + change, -MAX_MOVE, MAX_MOVE)
    tilt: Floats = np.abs(best_move[:, 4:]).max(axis=1)
    return tilt


def _sheared(b: Floats, move: Floats) -> Floats:
    scale_x, scale_y, shift_x, shift_y, into_x, into_y = (move[:, k, None, None] for k in range(6))
    across, down = _GRID[None, None, :], _GRID[None, :, None]
    x, y = (1 + scale_x) * across + into_x * down + shift_x, (1 + scale_y) * down + into_y * across + shift_y
    x, y = (np.clip((v + 0.5) * SIDE - 0.5, 0, SIDE - 1.001) for v in (x, y))
    left, top = x.astype(np.int32), y.astype(np.int32)
    right_share, bottom_share = (x - left)[..., None], (y - top)[..., None]
    pair = np.arange(len(b))[:, None, None]
    upper = b[pair, top, left] * (1 - right_share) + b[pair, top, left + 1] * right_share
    lower = b[pair, top + 1, left] * (1 - right_share) + b[pair, top + 1, left + 1] * right_share
    return np.asarray(upper * (1 - bottom_share) + lower * bottom_share, np.float32)


def _difference(a: Floats, warped: Floats) -> tuple[Floats, Floats]:
    """Best gain [P, 1, 1, 1] and what it leaves; where either picture is saturated the other may be anything brighter."""
    usable = (a < SATURATED) & (warped < SATURATED)
    top = (warped * a * usable).sum(axis=(1, 2, 3))
    bottom = (warped * warped * usable).sum(axis=(1, 2, 3))
    enough = usable.mean(axis=(1, 2, 3)) > 0.1
    gain = np.clip(np.where(enough, top / np.maximum(bottom, 1), 1), 0.8, 1.25)[:, None, None, None].astype(np.float32)
    difference = a - gain * warped
    excused = ((a >= SATURATED) & (difference < 0)) | ((warped >= SATURATED) & (gain < 1) & (difference > 0))
    return gain, np.where(excused, np.float32(0), difference)


def _warp(b: Floats, move: Floats) -> Floats:
    across, down = _resampling(move[:, 0], move[:, 2]), _resampling(move[:, 1], move[:, 3])
    p, k, _, c = b.shape
    rows = (down @ b.reshape(p, k, k * c)).reshape(p, k, k, c)
    return across[:, None] @ rows  # matrices act on the x axis of [P, y, x, colour]


_GRID = (np.arange(SIDE, dtype=np.float32) + 0.5) / SIDE - 0.5


def _resampling(scale: Floats, shift: Floats) -> Floats:
    """Linear interpolation at ((1 + scale) * x + shift) as matrices [P, K, K]."""
    x = np.clip(((1 + scale[:, None]) * _GRID + shift[:, None] + 0.5) * SIDE - 0.5, 0, SIDE - 1)
    matrices: Floats = np.maximum(0, 1 - np.abs(x[:, :, None] - np.arange(SIDE, dtype=np.float32)))
    return matrices


def _slopes(picture: Floats, sheared: bool = False) -> Floats:
    """Change of the picture per unit of each move, [P, 4 or 6, K, K, 3]."""
    across, down = np.gradient(picture, axis=2) * SIDE, np.gradient(picture, axis=1) * SIDE
    x, y = _GRID[None, None, :, None], _GRID[None, :, None, None]
    more = [across * y, down * x] if sheared else []
    return np.stack([across * x, down * y, across, down, *more], axis=1)


_OFFSETS = np.arange(SIDE)[:, None] - np.arange(SIDE)
_KERNEL = np.exp(-(_OFFSETS**2) / (2 * BLUR**2))
_SOFTEN = (_KERNEL / _KERNEL.sum(axis=1, keepdims=True)).astype(np.float32)


def _soft(thumbnails: NDArray[np.uint8]) -> Floats:
    values = thumbnails.astype(np.float32)
    p, k, _, c = values.shape
    rows = (_SOFTEN @ values.reshape(p, k, k * c)).reshape(p, k, k, c)
    return np.asarray(_SOFTEN @ rows, np.float32)

"""Further technical scores of one picture: borders, clipped pixels, text laid over it. Cheap rules, off unless asked for.

A border is a frame of one colour that ends in a straight line: the first row inside it differs nearly everywhere, which
the first row of a motif on a flat ground does not. Overlaid text is a band of rows with many thin strokes. Left out:
half-transparent watermarks, text that stands upright, text in the scene itself told from text laid over it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FLAT = 6.0  # grey levels: greatest spread within a border's row
STEP = 12.0  # grey levels by which the first row inside differs
STRAIGHT = 0.7  # of that row's pixels
DARK, BRIGHT = 1, 254
STROKE = 32.0  # grey levels between a stroke and its surroundings
WIDEST_STROKE = 6  # px, at the side at which quality is judged
BANDS = (6, 9, 13)  # rows of a line of text
BESIDE = 4  # rows above and below it

Grey = NDArray[np.float32]  # [H, W]


def border(grey: Grey) -> float:
    """Share of the height or width that a frame takes, the larger of the two."""
    shares = []
    for values in (grey, grey.T):
        shares.append((_depth(values) + _depth(values[::-1])) / len(values))
    return min(1.0, max(shares))


def _depth(rows: Grey) -> int:
    """Rows of one colour from the first on, if what follows them differs along a straight line; else 0."""
    colour = float(np.median(rows[0]))
    strange = (np.abs(rows - colour) > FLAT).mean(axis=1)
    inside = int(np.argmax(strange > 0.02)) if (strange > 0.02).any() else 0
    if inside == 0 or inside > len(rows) // 2:
        return 0
    soft = min(inside + 1, len(rows) - 1)  # the edge itself may be smeared over one row
    return inside if (np.abs(rows[soft] - colour) > STEP).mean() >= STRAIGHT else 0


def clipped(grey: Grey) -> float:
    """Share of pixels that are black or white to the last level."""
    return float(((grey <= DARK) | (grey >= BRIGHT)).mean())


def overlay(grey: Grey) -> float:
    """Thin strokes that the rows of a line of text have more than the rows above and below it; a motif's go on there."""
    change = np.diff(grey, axis=1)
    up, down = change > STROKE, change < -STROKE
    starts = np.zeros(change.shape, bool)  # an edge whose opposite follows within a stroke's width
    for width in range(1, WIDEST_STROKE + 1):
        starts[:, :-width] |= (up[:, :-width] & down[:, width:]) | (down[:, :-width] & up[:, width:])
    height = len(grey)
    before = np.concatenate([[0], np.cumsum(starts.sum(axis=1))])

    def mean(first: NDArray[np.int64], rows: int) -> NDArray[np.float64]:
        inside = (first >= 0) & (first + rows <= height)
        place = np.clip(first, 0, height - rows)
        found: NDArray[np.float64] = np.where(inside, (before[place + rows] - before[place]) / rows, 0.0)
        return found

    best = 0.0
    for band in (rows for rows in BANDS if rows + BESIDE <= height):
        first, gap = np.arange(height - band + 1), max(4, band // 2) // 2
        beside = np.maximum(mean(first - gap - BESIDE, BESIDE), mean(first + band + gap, BESIDE))
        best = max(best, float((mean(first, band) - beside).max()))
    return best

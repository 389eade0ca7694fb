"""Which pairs that a hash nominated are copies: equal once registered, by a move that copying makes.

Copying keeps a picture's frame or cuts it: then one picture lies within the other, and nothing is tilted. The same motif
drawn or taken again is registered by any shift and with a tilt. At a small hash distance and in the same frame, stronger
compression and a change of colours are excused.

Shapes: P pairs, K x K thumbnails of `registration`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data_curation.filter_config import DedupConfig
from data_curation.registration import Agreement, plausible, register, shear

SLACK = 0.0035  # by how much a cut may seem to leave the other picture, share of the side
ONE_WAY = 0.009  # and by how much it may seem to widen one side while it narrows the other
LARGEST_CUT = 0.045
SAME_SCALE, SAME_SHIFT = 0.014, 0.003  # moves within which the frame counts as kept
SAME_RELATIVE, SAME_TINT, SAME_SHEAR = 0.55, 8.0, 0.008
BATCH = 4_096

Flags = NDArray[np.bool_]


def are_copies(
    first: NDArray[np.uint8], second: NDArray[np.uint8], distance: NDArray[np.int64], config: DedupConfig
) -> Flags:
    """Which pairs of thumbnails [P, K, K, 3] with these hash distances show one picture."""
    copies = np.zeros(len(first), bool)
    rest = np.flatnonzero(plausible(first, second))
    found = register(first[rest], second[rest])
    no_tilt = np.zeros(len(rest), np.float32)
    likely = np.flatnonzero(_cut(found, no_tilt, config) | _same_frame(found, no_tilt, distance[rest], config))
    rest, found = rest[likely], _picked(found, likely)
    tilt = shear(first[rest], second[rest])
    copies[rest] = _cut(found, tilt, config) | _same_frame(found, tilt, distance[rest], config)
    return copies


def confirmed(
    row_ids: list[str], thumbnails: dict[str, NDArray[np.uint8]], i: NDArray[np.int64], j: NDArray[np.int64],
    distance: NDArray[np.int64], config: DedupConfig, others: list[str] | None = None,
) -> Flags:  # fmt: skip
    """The same for nominated pairs of rows; `others`: the ids that j counts in, if not the same."""
    parts = [np.zeros(0, bool)]
    for start in range(0, len(i), BATCH):
        part = slice(start, start + BATCH)
        first = np.stack([thumbnails[row_ids[k]] for k in i[part]])
        second = np.stack([thumbnails[(others or row_ids)[k]] for k in j[part]])
        parts.append(are_copies(first, second, distance[part], config))
    return np.concatenate(parts)


def _picked(found: Agreement, rows: NDArray[np.int64]) -> Agreement:
    return Agreement(found.residual[rows], found.relative[rows], found.tint[rows], found.move[rows])


def _cut(found: Agreement, tilt: NDArray[np.float32], config: DedupConfig) -> Flags:
    scale, shift = found.move[:, :2], found.move[:, 2:]
    within = (np.abs(shift) <= np.abs(scale) / 2 + SLACK).all(axis=1) & (np.abs(scale) < LARGEST_CUT).all(axis=1)
    one_way = (scale.min(axis=1) > -ONE_WAY) | (scale.max(axis=1) < ONE_WAY)
    misfit = [(tilt, config.max_shear), (found.relative, config.max_relative), (found.tint, config.max_tint)]
    close = np.sum([(value / limit) ** 2 for value, limit in misfit], axis=0) < 1
    return np.asarray(within & one_way & close, bool)


def _same_frame(
    found: Agreement, tilt: NDArray[np.float32], distance: NDArray[np.int64], config: DedupConfig
) -> Flags:  # fmt: skip
    scale, shift = np.abs(found.move[:, :2]), np.abs(found.move[:, 2:])
    kept: Flags = (scale < SAME_SCALE).all(axis=1) & (shift < SAME_SHIFT).all(axis=1) & (tilt < SAME_SHEAR)
    alike: Flags = (found.relative < SAME_RELATIVE) & (found.tint < SAME_TINT)
    return kept & alike & (distance <= config.same_distance)

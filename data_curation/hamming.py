"""All pairs of hashes within a Hamming distance, exactly: banded search by the pigeonhole principle.

Cut the hash into m bands: hashes that differ in at most d bits agree up to d // m bits in some band. Each band is
sorted once and probed with every mask of so few bits. Small sets are compared all with all, which is then cheaper.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

BAND_BITS = 16
PAIR_SECONDS, PROBE_SECONDS = 1e-8, 4e-8  # measured on one core; they only choose between two exact ways
CHUNK_PAIRS = 2_000_000

Pairs = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]  # i, j (i < j), distance


def near_pairs(hashes: NDArray[np.uint8], max_distance: int) -> Pairs:
    """Every pair i < j of packed hashes [n, bytes] with distance <= max_distance, sorted by (i, j)."""
    n, num_bytes = hashes.shape
    num_bands = num_bytes * 8 // BAND_BITS
    if num_bands == 0 or max_distance >= 3 * num_bands:  # more than two bits a band: too many probes
        return all_pairs(hashes, max_distance)
    masks = probe_masks(max_distance // num_bands)
    banded = n * num_bands * len(masks) * (PROBE_SECONDS + n * PAIR_SECONDS / 2**BAND_BITS)
    if n * n / 2 * PAIR_SECONDS < banded:
        return all_pairs(hashes, max_distance)
    return banded_pairs(hashes, max_distance)


def probe_masks(radius: int) -> NDArray[np.uint16]:
    """Every 16-bit mask of at most `radius` bits."""
    bits = [sum(1 << b for b in chosen) for r in range(radius + 1) for chosen in combinations(range(BAND_BITS), r)]
    return np.array(bits, np.uint16)


def all_pairs(hashes: NDArray[np.uint8], max_distance: int) -> Pairs:
    """The slow, obvious way: every hash against every later one."""
    words = _words(hashes)
    found = []
    for i in range(len(words) - 1):
        distance = np.bitwise_count(words[i + 1 :] ^ words[i]).sum(axis=1, dtype=np.int64)
        j = np.flatnonzero(distance <= max_distance)
        found.append((np.full(len(j), i, np.int64), j + i + 1, distance[j]))
    return _sorted(found)


def banded_pairs(hashes: NDArray[np.uint8], max_distance: int) -> Pairs:
    """The banded way; the same pairs."""
    words, bands = _words(hashes), np.ascontiguousarray(hashes).view(np.uint16)
    num_bands = bands.shape[1]
    found = []
    for band in range(num_bands):
        keys = bands[:, band]
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        for mask in probe_masks(max_distance // num_bands):
            probes = keys ^ mask
            low, high = np.searchsorted(ordered, probes, "left"), np.searchsorted(ordered, probes, "right")
            for i, j in _candidates(low, high, order):
                distance = np.bitwise_count(words[i] ^ words[j]).sum(axis=1, dtype=np.int64)
                near = distance <= max_distance
                found.append((i[near], j[near], distance[near]))
    return _sorted(found)


def _candidates(
    low: NDArray[np.int64], high: NDArray[np.int64], order: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Pairs (i, order[low[i]:high[i]]) with i < j, in chunks of bounded size."""
    counts = high - low
    cuts = np.searchsorted(np.cumsum(counts), np.arange(CHUNK_PAIRS, counts.sum() + CHUNK_PAIRS, CHUNK_PAIRS), "right")
    start = 0
    for stop in dict.fromkeys([*(int(c) for c in cuts), len(counts)]):
        part = counts[start:stop]
        i = np.repeat(np.arange(start, stop), part)
        inside = np.arange(len(i)) - np.repeat(np.cumsum(part) - part, part)
        j = order[low[i] + inside]
        yield i[i < j], j[i < j]
        start = stop


def _words(hashes: NDArray[np.uint8]) -> NDArray[np.uint64]:
    padded = np.pad(hashes, ((0, 0), (0, -hashes.shape[1] % 8)))
    return np.ascontiguousarray(padded).view(np.uint64)


def _sorted(found: list[Pairs]) -> Pairs:
    empty = np.empty(0, np.int64)
    i, j, distance = (np.concatenate([empty, *(part[k] for part in found)]) for k in range(3))
    _, first = np.unique(i * (int(j.max(initial=0)) + 1) + j, return_index=True)
    return i[first], j[first], distance[first]

"""All pairs of hashes within a Hamming distance, exactly: banded search by the pigeonhole principle.

Cut the hash into bands with radii r_b where sum (r_b + 1) > d: hashes that differ in at most d bits agree up to r_b bits
in some band b. A band is sorted once; for every mask of so few bits, hashes whose keys differ by it are candidates. How
many bands, how wide and with which radii is chosen for the number of hashes: few narrow bands would give too many
candidates, wide ones need too many masks. Equal hashes are searched once. Small sets are compared all with all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

WIDEST = 24  # bits of a band: its table of 2^24 starts has 64 MiB
PAIR_SECONDS, CANDIDATE_SECONDS, PROBE_SECONDS = 3e-9, 1.2e-8, 1.2e-8  # about, on one core; they only choose the way
KEY_SECONDS = 4e-9  # of the table of starts
CHUNK_ROWS, CHUNK_PAIRS, FEW_ROWS = (
    1 << 17,
    1 << 17,
    1 << 11,
)  # pairs whose arrays stay in the cache; rows too few for a pass of their own

Indices = NDArray[np.int64]
Pairs = tuple[Indices, Indices, Indices]  # i, j (i < j), distance


@dataclass(frozen=True)
class Band:
    """Bits start to start + width of a hash; keys that differ in at most `radius` bits are candidates."""

    start: int
    width: int
    radius: int

    @property
    def num_masks(self) -> int:
        """Masks of at most `radius` bits."""
        return sum(comb(self.width, r) for r in range(self.radius + 1))

    def masks(self) -> Iterator[int]:
        """Every one of them, the empty one first."""
        for r in range(self.radius + 1):
            yield from (sum(1 << b for b in chosen) for chosen in combinations(range(self.width), r))

    def cost(self, n: int) -> float:
        """Expected seconds among n uniform hashes."""
        candidates = n * n / 2 / float(1 << self.width)  # with each mask: half of the rows are looked up
        masked = (self.num_masks - 1) * (n / 2 * PROBE_SECONDS + candidates * CANDIDATE_SECONDS)
        return masked + candidates * PAIR_SECONDS + (1 << self.width) * KEY_SECONDS


def near_pairs(hashes: NDArray[np.uint8], max_distance: int) -> Pairs:
    """Every pair i < j of packed hashes [n, bytes] with distance <= max_distance, sorted by (i, j)."""
    n, num_bytes = hashes.shape
    bands = plan_bands(num_bytes * 8, max_distance, n)
    if not bands or n * n / 2 * PAIR_SECONDS < sum(band.cost(n) for band in bands):
        return all_pairs(hashes, max_distance)
    return banded_pairs(hashes, max_distance, bands)


def plan_bands(num_bits: int, max_distance: int, n: int) -> tuple[Band, ...]:
    """The cheapest bands for n hashes; none where the distance is too large for any."""
    plans = []
    for count in range(1, max_distance + 2):
        radius, wider = divmod(max_distance + 1, count)  # `wider` bands have the larger radius, the others one less
        for width in range(1, min(WIDEST, num_bits // count) + 1):
            widths = [width] * (count - wider)
            radii = [radius - 1] * (count - wider)
            if wider:
                widths += [min(WIDEST, (num_bits - sum(widths)) // wider)] * wider
                radii += [radius] * wider
            starts = np.cumsum([0, *widths])[:-1].tolist()
            plans.append(tuple(map(Band, starts, widths, radii)))
    return min(plans, key=lambda bands: sum(band.cost(n) for band in bands), default=())


def all_pairs(hashes: NDArray[np.uint8], max_distance: int) -> Pairs:
    """The slow, obvious way: every hash against every later one."""
    words = _words(hashes)
    found = []
    for i in range(len(hashes) - 1):
        distance = _distances(words[:, i + 1 :], words[:, i : i + 1])
        j = np.flatnonzero(distance <= max_distance)
        found.append((np.full(len(j), i, np.int64), j + i + 1, distance[j].astype(np.int64)))
    return _sorted(found, len(hashes))


def cross_pairs(hashes: NDArray[np.uint8], others: NDArray[np.uint8], max_distance: int) -> Pairs:
    """Pairs (i of `hashes`, j of `others`) within the distance, each hash against all others: linear in both."""
    left, right = _words(hashes), _words(others)
    found = [(np.empty(0, np.int64),) * 3]
    for i in range(len(hashes)):
        distance = _distances(right, left[:, i : i + 1])
        j = np.flatnonzero(distance <= max_distance)
        found.append((np.full(len(j), i, np.int64), j, distance[j].astype(np.int64)))
    return tuple(np.concatenate(part) for part in zip(*found, strict=True))  # type: ignore[return-value]


def banded_pairs(hashes: NDArray[np.uint8], max_distance: int, bands: tuple[Band, ...] | None = None) -> Pairs:
    """The banded way; the same pairs."""
    if bands is None:
        bands = plan_bands(hashes.shape[1] * 8, max_distance, len(hashes))
    words = _words(hashes)
    distinct, groups = _distinct(words)
    found = [pair for band in bands for pair in _pairs_of(band, distinct, max_distance)]
    return _sorted([*_expanded(_sorted(found, distinct.shape[1]), groups), *_equal(groups)], len(hashes))


def _pairs_of(band: Band, words: NDArray[np.uint64], max_distance: int) -> Iterator[Pairs]:
    """Pairs of distinct hashes that one band finds; of the two orders of a pair only one is looked at."""
    keys, order = _sorted_keys(band, words)
    words = words[:, order]  # neighbours in the band lie together in memory
    starts = np.zeros((1 << band.width) + 1, np.int32)
    np.cumsum(np.bincount(keys, minlength=1 << band.width), out=starts[1:])
    masks = tuple(band.masks())
    for start in range(0, len(keys), CHUNK_ROWS):  # so that arrays stay in the cache
        part = keys[start : start + CHUNK_ROWS]
        for mask in masks:
            if mask:
                first = np.flatnonzero(part & (1 << mask.bit_length() - 1) == 0)
                others = part[first] ^ mask
                low, high = starts[others].astype(np.int64), starts[others + 1].astype(np.int64)
                found = _near(words, _candidates(first + start, low, high), max_distance)
            else:
                found = _near_in_order(words, start, starts[part + 1].astype(np.int64), max_distance)
            for i, j, distance in found:
                a, b = order[i], order[j]
                yield np.minimum(a, b), np.maximum(a, b), distance


def _near(
    words: NDArray[np.uint64], candidates: Iterator[tuple[Indices, Indices]], max_distance: int
) -> Iterator[Pairs]:
    """The candidates that are within the distance."""
    for i, j in candidates:
        distance = _distances(words[:, i], words[:, j])
        near = np.flatnonzero(distance <= max_distance)
        if len(near):
            yield i[near], j[near], distance[near].astype(np.int64)


def _near_in_order(words: NDArray[np.uint64], start: int, end: Indices, max_distance: int) -> Iterator[Pairs]:
    """Pairs of equal keys from row `start` on, row k's bucket ending at `end[k]`: each row and the one `shift` after it.

    Nothing is gathered while most buckets have so many rows; a pair over a bucket's edge is as near as it says.
    """
    rows, shift = np.arange(start, start + len(end)), 1
    while 2 * np.count_nonzero(end - rows > shift) > len(rows):
        stop = min(start + len(rows), words.shape[1] - shift)
        distance = _distances(words[:, start:stop], words[:, start + shift : stop + shift])
        near = np.flatnonzero(distance <= max_distance)
        if len(near):
            yield near + start, near + (start + shift), distance[near].astype(np.int64)
        shift += 1
    left = np.flatnonzero(end - rows > shift)
    yield from _near(words, _candidates(rows[left], rows[left] + shift, end[left]), max_distance)


def _candidates(first: Indices, low: Indices, high: Indices) -> Iterator[tuple[Indices, Indices]]:
    """Pairs (first[k], low[k] to high[k]), in chunks of bounded size: column by column while there are many rows."""
    for start in range(0, len(first), CHUNK_PAIRS):
        part = slice(start, start + CHUNK_PAIRS)
        i, j, end = first[part], low[part], high[part]
        while True:
            left = np.flatnonzero(j < end)
            if len(left) < len(i):
                i, j, end = i[left], j[left], end[left]
            if len(i) < FEW_ROWS:
                yield from _rows_of_pairs(i, j, end)
                break
            yield i, j
            j = j + 1


def _rows_of_pairs(first: Indices, low: Indices, high: Indices) -> Iterator[tuple[Indices, Indices]]:
    """The same, row by row, for few rows that may be long: hot buckets."""
    counts = high - low
    before = np.concatenate([[0], np.cumsum(counts)])
    start = 0
    while start < len(first):
        stop = max(start + 1, int(np.searchsorted(before, before[start] + CHUNK_PAIRS, "right")) - 1)
        part = counts[start:stop]
        places = np.arange(before[stop] - before[start])
        yield (
            np.repeat(first[start:stop], part),
            places + np.repeat(low[start:stop] - (before[start:stop] - before[start]), part),
        )
        start = stop


def _sorted_keys(band: Band, words: NDArray[np.uint64]) -> tuple[Indices, Indices]:
    """Keys of a band in order, and whose they are; numpy sorts key and place in one word ten times as fast as places."""
    word, offset = divmod(band.start, 64)
    keys = words[word] >> np.uint64(offset)
    if offset + band.width > 64:
        keys = keys | words[word + 1] << np.uint64(64 - offset)
    keys = keys & np.uint64((1 << band.width) - 1)
    both = np.sort(keys << np.uint64(32) | np.arange(words.shape[1], dtype=np.uint64))
    return (both >> np.uint64(32)).astype(np.int64), (both & np.uint64(0xFFFFFFFF)).astype(np.int64)


def _distances(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> NDArray[np.unsignedinteger[Any]]:
    """Bits in which [words, n] hashes differ."""
    first: NDArray[np.uint8] = np.bitwise_count(a[0] ^ b[0])
    if len(a) == 1:
        return first
    total = first.astype(np.uint16)
    for left, right in zip(a[1:], b[1:], strict=True):
        total += np.bitwise_count(left ^ right)
    return total


def _words(hashes: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Hashes [n, bytes] as [words, n]."""
    padded = np.pad(hashes, ((0, 0), (0, -hashes.shape[1] % 8)))
    return np.ascontiguousarray(np.ascontiguousarray(padded).view(np.uint64).T)


def _distinct(words: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], list[Indices]]:
    """Each different hash once, and per different hash [start..] where it stands: (order, starts)."""
    order = np.argsort(words[0]) if len(words) == 1 else np.lexsort(words)
    ordered = words[:, order]
    new = np.ones(words.shape[1] + 1, bool)
    new[1:-1] = (ordered[:, 1:] != ordered[:, :-1]).any(axis=0)
    return ordered[:, new[:-1]], [order, np.flatnonzero(new)]


def _expanded(pairs: Pairs, groups: list[Indices]) -> Iterator[Pairs]:
    """Pairs of distinct hashes as pairs of their places."""
    (order, starts), (a, b, distance) = groups, pairs
    sizes = np.diff(starts)
    times = sizes[a] * sizes[b]
    for pick in np.array_split(np.arange(len(a)), max(1, int(times.sum()) // CHUNK_PAIRS)):
        part = times[pick]
        pair = np.repeat(pick, part)
        inside = np.arange(len(pair)) - np.repeat(np.cumsum(part) - part, part)
        i = order[starts[a[pair]] + inside // sizes[b[pair]]]
        j = order[starts[b[pair]] + inside % sizes[b[pair]]]
        yield np.minimum(i, j), np.maximum(i, j), distance[pair]


def _equal(groups: list[Indices]) -> Iterator[Pairs]:
    """Pairs of equal hashes."""
    order, starts = groups
    for group in np.flatnonzero(np.diff(starts) > 1):
        places = np.sort(order[starts[group] : starts[group + 1]])
        i, j = np.triu_indices(len(places), 1)
        yield places[i], places[j], np.zeros(len(i), np.int64)


def _sorted(found: list[Pairs], n: int) -> Pairs:
    empty = np.empty(0, np.int64)
    i, j, distance = (np.concatenate([empty, *(part[k] for part in found)]) for k in range(3))
    _, first = np.unique(i * n + j, return_index=True)
    return i[first], j[first], distance[first]

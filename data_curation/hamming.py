"""All pairs of hashes within a Hamming distance, exactly: rows sorted once per key of `bands.py`, neighbours compared.

Rows that agree in a key are a bucket. A hash of one word is sorted as a whole, its key moved to the top, so that buckets lie
together and nothing is gathered; the distance does not mind the order of bits. Longer hashes are sorted by key and place.
A pair is given by the first key it agrees in, so memory holds each pair once. Equal hashes are searched once. Hot buckets
(many different hashes that agree in a key) are searched again by the bits that are left. Small sets are compared all with all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_curation.bands import Bits, Group, keys_of, plan_groups
from data_curation.key_order import CHUNK_ROWS, KEY_BITS, Order, Words, by_place, by_word

HOT = 1 << 14  # rows of a bucket that is searched again
CHUNK_PAIRS = 1 << 16  # whose arrays stay in the cache
FEW_ROWS = 1 << 11  # too few for a pass of their own
GATHER = 24  # what looking up one row costs, in rows compared in order
PREFIX_BITS = 24  # of the table of what is wanted: 16 MiB

Indices = NDArray[np.int64]
Pairs = tuple[Indices, Indices, Indices]  # i, j (i < j), distance
Distances = NDArray[np.unsignedinteger[Any]]
Places = Iterator[tuple[Indices, Indices]]
Found = Iterator[tuple[Words, Words]]


def near_pairs(hashes: NDArray[np.uint8], max_distance: int) -> Pairs:
    """Every pair i < j of packed hashes [n, bytes] with distance <= max_distance, sorted by (i, j)."""
    n, num_bytes = hashes.shape
    groups = plan_groups(num_bytes * 8, max_distance, n)
    return banded_pairs(hashes, max_distance, groups) if groups else all_pairs(hashes, max_distance)


def banded_pairs(
    hashes: NDArray[np.uint8], max_distance: int, groups: tuple[Group, ...] | None = None, hot: int = HOT
) -> Pairs:
    """The same pairs by keys, of these groups of bits or one bit more than differ may; `hot`: rows of a hot bucket."""
    if len(hashes) >= 1 << KEY_BITS:
        raise ValueError(f"{len(hashes)} hashes, at most 2^{KEY_BITS} - 1 in one search; search them in parts")
    words = _words(hashes)
    distinct, repeated = _distinct(words)
    bits = tuple(range(hashes.shape[1] * 8))
    found = _search(distinct, bits, max_distance, groups or (Group(max_distance, 1),), hot)
    first, second = (np.concatenate(part, axis=1) for part in zip((repeated, repeated), *found, strict=True))
    distance = _distances(first, second).astype(np.int64)
    wanted, number = _numbered(np.concatenate([first, second], axis=1))
    a, b = np.split(number, 2)
    return _sorted(list(_expanded((a, b, distance), _standing(words, wanted))), len(hashes))


def all_pairs(hashes: NDArray[np.uint8], max_distance: int) -> Pairs:
    """The slow, obvious way: every hash against every later one."""
    words = _words(hashes)
    found = []
    for i, j in _all_with_all(words, max_distance):
        found.append((i, j, _distances(words[:, i], words[:, j]).astype(np.int64)))
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


def _all_with_all(words: Words, max_distance: int) -> Places:
    """Places i < j."""
    for i in range(words.shape[1] - 1):
        j = np.flatnonzero(_distances(words[:, i + 1 :], words[:, i : i + 1]) <= max_distance)
        if len(j):
            yield np.full(len(j), i, np.int64), j + i + 1


def _search(words: Words, bits: Bits, max_distance: int, groups: tuple[Group, ...], hot: int) -> Found:
    """Every pair of distinct hashes that differ in at most so many of `bits`, and in no other."""
    if not groups:
        yield from ((words[:, i], words[:, j]) for i, j in _all_with_all(words, max_distance))
        return
    order_by, width = (by_word(words), 64) if len(words) == 1 else (by_place(words), KEY_BITS)
    keys = [key[:width] for key in keys_of(bits, groups)]
    for number, key in enumerate(keys):
        order = order_by(key)
        earlier = [order.mask(other) for other in keys[:number]]
        free = tuple(sorted(order.moved[bit] for bit in set(bits).difference(key)))

        def again(part: Words, free: Bits = free) -> Found:
            return _search(part, free, max_distance, plan_groups(len(free), max_distance, part.shape[1]), hot)

        for first, second in _joined(_in_buckets(order, max_distance, hot, again)):
            different = first ^ second
            new = np.ones(first.shape[1], bool)
            for mask in earlier:
                new &= (different & mask).any(axis=0)
            yield order.restored(first[:, new]), order.restored(second[:, new])


def _in_buckets(order: Order, max_distance: int, hot: int, again: Callable[[Words], Found]) -> Found:
    """Rows of equal keys that are within the distance, in chunks of whole buckets; `again` searches a hot one."""
    start, n, below = 0, len(order.keys), np.uint64((1 << order.shift) - 1)
    while start < n:
        stop = min(start + CHUNK_ROWS, n)
        stop += int(np.searchsorted(order.keys[stop:], order.keys[stop - 1] | below, "right"))
        keys = order.keys[start:stop] >> np.uint64(order.shift)
        edges = np.concatenate([[0], np.flatnonzero(keys[1:] != keys[:-1]) + 1, [stop - start]])
        sizes = np.diff(edges)
        for bucket in np.flatnonzero(sizes > hot):
            first = start + int(edges[bucket])
            yield from again(order.words[:, first : start + int(edges[bucket + 1])])
        ends = np.repeat(np.where(sizes > hot, edges[:-1], edges[1:]).astype(np.int32), sizes)
        words = order.words[:, start:stop]
        for i, j in _near_in_order(words, ends, sizes[sizes <= hot], max_distance):
            yield words[:, i], words[:, j]
        start = stop


def _joined(found: Found) -> Found:
    """The same in longer arrays."""
    parts: list[tuple[Words, Words]] = []
    waiting = 0
    for part in found:
        parts.append(part)
        waiting += part[0].shape[1]
        if waiting > CHUNK_PAIRS:
            yield tuple(np.concatenate(some, axis=1) for some in zip(*parts, strict=True))  # type: ignore[misc]
            parts, waiting = [], 0
    if parts:
        yield tuple(np.concatenate(some, axis=1) for some in zip(*parts, strict=True))  # type: ignore[misc]


def _near_in_order(words: Words, ends: NDArray[np.int32], sizes: Indices, max_distance: int) -> Places:
    """Pairs within buckets of these sizes, each row's ending at `ends`: rows one `shift` apart while many have so many."""
    after, shift = ends - np.arange(len(ends), dtype=np.int32), 1
    buckets = np.bincount(sizes)[::-1].cumsum()[::-1]  # with so many rows or more
    followed = [*(buckets[::-1].cumsum()[::-1] * GATHER).tolist(), 0]  # [s]: rows that have one s - 1 after them
    nearest: Distances = np.full(len(ends), 255, np.uint8)  # to a row after it
    if len(words) > 1:
        nearest = np.full(len(ends), 65_535, np.uint16)
    while shift + 1 < len(followed) and followed[shift + 1] > len(ends):
        before = nearest[:-shift]
        np.minimum(before, _distances(words[:, :-shift], words[:, shift:]), out=before)
        shift += 1
    few, left = np.flatnonzero(nearest <= max_distance), np.flatnonzero(after > shift)
    low, high = np.append(few + 1, left + shift), np.append(np.minimum(ends[few], few + shift), ends[left])
    for i, j in _candidates(np.append(few, left), low, high.astype(np.int64)):
        near = np.flatnonzero(_distances(words[:, i], words[:, j]) <= max_distance)
        if len(near):
            yield i[near], j[near]


def _candidates(first: Indices, low: Indices, high: Indices) -> Places:
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


def _rows_of_pairs(first: Indices, low: Indices, high: Indices) -> Places:
    """The same, row by row, for few rows that may each have many."""
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


def _distances(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> Distances:
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
    if hashes.shape[1] % 8:
        hashes = np.pad(hashes, ((0, 0), (0, -hashes.shape[1] % 8)))
    return np.ascontiguousarray(np.ascontiguousarray(hashes).view(np.uint64).T)


def _distinct(words: Words) -> tuple[Words, Words]:
    """Each different hash once, and those that stand more than once."""
    ordered = np.sort(words) if len(words) == 1 else words[:, np.lexsort(words)]
    again = np.append(False, (ordered[:, 1:] == ordered[:, :-1]).all(axis=0))[: words.shape[1]]
    return (ordered[:, ~again], _numbered(ordered[:, again])[0]) if again.any() else (ordered, words[:, :0])


def _numbered(words: Words) -> tuple[Words, Indices]:
    """Each different hash once, in order, and for each of `words` which of these it is."""
    order = np.argsort(words[0]) if len(words) == 1 else np.lexsort(words)
    ordered, number = words[:, order], np.empty(len(order), np.int64)
    new = np.append(True, (ordered[:, 1:] != ordered[:, :-1]).any(axis=0))[: len(order)]
    number[order] = new.cumsum() - 1
    return ordered[:, new], number


def _standing(words: Words, wanted: Words) -> list[Indices]:
    """Where each of these different hashes [words, k], in order, stands: (places, start of each in them and the end)."""
    shift = np.uint64(64 - min(PREFIX_BITS, 4 + wanted.shape[1].bit_length()))
    prefixes = np.zeros(1 << 64 - int(shift), bool)
    prefixes[wanted[-1] >> shift] = True
    chunks = range(0, words.shape[1], CHUNK_ROWS)
    marked = (np.flatnonzero(prefixes[words[-1, start : start + CHUNK_ROWS] >> shift]) + start for start in chunks)
    places = np.concatenate([np.empty(0, np.int64), *marked])  # with few others
    _, number = _numbered(np.concatenate([wanted, words[:, places]], axis=1))
    which = np.full(len(number), -1)
    which[number[: wanted.shape[1]]] = np.arange(wanted.shape[1])
    standing = which[number[wanted.shape[1] :]]
    order = np.argsort(standing)
    starts = np.searchsorted(standing[order], np.arange(wanted.shape[1] + 1))
    return [places[order], starts]


def _expanded(pairs: Pairs, groups: list[Indices]) -> Iterator[Pairs]:
    """Pairs of different hashes, or of a hash and itself, as pairs of their places."""
    (order, starts), (a, b, distance) = groups, pairs
    sizes = np.diff(starts)
    times = sizes[a] * sizes[b]
    for pick in np.array_split(np.arange(len(a)), max(1, int(times.sum()) // CHUNK_PAIRS)):
        part = times[pick]
        pair = np.repeat(pick, part)
        inside = np.arange(len(pair)) - np.repeat(np.cumsum(part) - part, part)
        i = order[starts[a[pair]] + inside // sizes[b[pair]]]
        j = order[starts[b[pair]] + inside % sizes[b[pair]]]
        once = (a[pair] != b[pair]) | (i < j)
        yield np.minimum(i, j)[once], np.maximum(i, j)[once], distance[pair][once]


def _sorted(found: list[Pairs], n: int) -> Pairs:
    """By (i, j); each comes once."""
    empty = np.empty(0, np.int64)
    i, j, distance = (np.concatenate([empty, *(part[k] for part in found)]) for k in range(3))
    order = np.argsort(i * n + j)
    return i[order], j[order], distance[order]

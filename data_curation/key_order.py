"""Hashes in the order of some of their bits, so that those which agree in these lie together (for `hamming.py`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_curation.bands import Bits, runs

CHUNK_ROWS = 1 << 15  # whose arrays stay in the cache
KEY_BITS = 32  # of a sort by key and place

Words = NDArray[np.uint64]  # [words, n]


class Order(NamedTuple):
    """Hashes in the order of a key."""

    words: Words
    keys: NDArray[np.uint64]  # ascending; the key and below it `shift` other bits
    shift: int
    moved: Mapping[int, int]  # where a bit of the hash stands in `words`
    restored: Callable[[Words], Words]  # hashes as they came from hashes of `words`

    def mask(self, key: Bits) -> Words:
        """The bits of another key [words, 1]."""
        whole = sum(1 << self.moved[bit] for bit in key)
        return np.array([[whole >> 64 * word & (1 << 64) - 1] for word in range(len(self.words))], np.uint64)


def by_word(words: Words) -> Callable[[Bits], Order]:
    """Whole hashes of one word, sorted with a key's bits moved to the top; one order at a time is valid."""
    buffer = np.empty_like(words)

    def order(key: Bits) -> Order:
        sources = (*(bit for bit in range(64) if bit not in set(key)), *key)
        there = [(first, width, sources.index(first)) for first, width in runs(sources)]
        back = [(target, width, source) for source, width, target in there]
        _move(words, there, buffer)
        buffer.sort()
        moved = {source: target for target, source in enumerate(sources)}
        return Order(buffer, buffer[0], 64 - len(key), moved, lambda few: _move(few, back, np.empty_like(few)))

    return order


def _move(words: Words, moves: list[tuple[int, int, int]], out: Words) -> Words:
    """Write words with runs of bits (from, how many, to) moved into `out`."""
    for start in range(0, words.shape[1], CHUNK_ROWS):
        part, written = words[:, start : start + CHUNK_ROWS], out[:, start : start + CHUNK_ROWS]
        written[:] = 0
        for source, width, target in moves:
            piece = part & np.uint64((1 << width) - 1 << source)
            if target > source:
                piece <<= np.uint64(target - source)
            else:
                piece >>= np.uint64(source - target)
            written |= piece
    return out


def by_place(words: Words) -> Callable[[Bits], Order]:
    """Longer hashes, gathered: a key of at most KEY_BITS and a place in one word sort ten times as fast as places."""
    same = range(64 * len(words))

    def order(key: Bits) -> Order:
        both = np.zeros(words.shape[1], np.uint64)
        for first, width in runs(key):
            for part, bits in _in_words(first, width):
                word, offset = divmod(part, 64)
                both = both << np.uint64(bits) | words[word] >> np.uint64(offset) & np.uint64((1 << bits) - 1)
        both = both << np.uint64(KEY_BITS) | np.arange(words.shape[1], dtype=np.uint64)
        both.sort()
        order = (both & np.uint64((1 << KEY_BITS) - 1)).astype(np.int64)
        return Order(words[:, order], both, KEY_BITS, dict(enumerate(same)), lambda few: few)

    return order


def _in_words(first: int, width: int) -> list[tuple[int, int]]:
    """A run of bits cut where a word ends."""
    edges = [first, *range(first // 64 * 64 + 64, first + width, 64), first + width]
    return [(low, high - low) for low, high in pairwise(edges)]

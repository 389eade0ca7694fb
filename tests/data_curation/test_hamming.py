"""Banded search finds exactly the pairs that comparing all with all finds."""

import numpy as np
import pytest

from data_curation.hamming import all_pairs, banded_pairs, near_pairs


def planted(rng: np.random.Generator, number: int, num_bytes: int) -> np.ndarray:
    hashes = rng.integers(0, 256, (number, num_bytes), dtype=np.uint8)
    hashes[: number // 4] = hashes[0]  # a hot bucket, as blank pictures make
    for row in hashes[: number // 2]:
        for bit in rng.integers(0, num_bytes * 8, rng.integers(0, num_bytes)):
            row[bit // 8] ^= np.uint8(1 << (bit % 8))
    return hashes


@pytest.mark.parametrize(("num_bytes", "distance"), [(8, 0), (8, 3), (8, 7), (32, 15), (32, 31), (32, 44)])
def test_bands_find_what_all_pairs_find(num_bytes: int, distance: int) -> None:
    hashes = planted(np.random.default_rng(distance), 300, num_bytes)
    slow, fast = all_pairs(hashes, distance), banded_pairs(hashes, distance)
    assert len(slow[0]) > 0
    for a, b in zip(slow, fast, strict=True):
        assert np.array_equal(a, b)
    i, j, found = near_pairs(hashes, distance)
    assert (i < j).all()
    assert found.max() <= distance


def test_few_hashes_have_few_pairs() -> None:
    for number in (0, 1):
        assert all(len(part) == 0 for part in banded_pairs(np.zeros((number, 32), np.uint8), 10))
        assert all(len(part) == 0 for part in all_pairs(np.zeros((number, 32), np.uint8), 10))


@pytest.mark.parametrize("skewed", [False, True])
def test_ten_thousand_hashes_give_the_same_pairs(skewed: bool) -> None:
    rng = np.random.default_rng(10 + skewed)
    hashes = rng.integers(0, 256, (10_000, 8), dtype=np.uint8)
    if skewed:
        hashes[:1000, :4] = hashes[0, :4]  # two hot bands
        hashes[1000:1200] = hashes[0]  # blank pictures
    for copy, original in enumerate(range(5000, 5500), start=9500):
        bits = np.zeros(64, np.uint8)
        bits[rng.choice(64, rng.integers(0, 6), replace=False)] = 1
        hashes[copy] = hashes[original] ^ np.packbits(bits)
    slow, fast = all_pairs(hashes, 4), banded_pairs(hashes, 4)
    assert len(slow[0]) > 300
    for a, b in zip(slow, fast, strict=True):
        assert np.array_equal(a, b)
    assert len(all_pairs(hashes, 3)[0]) < len(slow[0])  # the control: another distance gives other pairs

"""Banded search finds exactly the pairs that comparing all with all finds."""

import numpy as np
import pytest

from data_curation.bands import Group, keys_of, plan_groups, seconds
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


def some_groups(rng: np.random.Generator, distance: int) -> tuple[Group, ...]:
    """Any groups whose radii, each and one more, add up to the distance and one more."""
    left, groups = distance + 1, []
    while left:
        part = int(rng.integers(1, left + 1))
        groups.append(Group(part - 1, int(rng.integers(1, 4))))
        left -= part
    return tuple(groups)


@pytest.mark.parametrize("seed", range(60))
def test_any_groups_of_bands_find_what_all_pairs_find(seed: int) -> None:
    rng = np.random.default_rng(seed)
    distance = int(rng.integers(0, 7))
    hashes = planted(rng, int(rng.integers(2, 400)), int(rng.choice([4, 5, 8, 9, 16, 32])))
    groups, hot = some_groups(rng, distance), int(rng.choice([2, 8, 1 << 14]))
    for a, b in zip(all_pairs(hashes, distance), banded_pairs(hashes, distance, groups, hot), strict=True):
        assert np.array_equal(a, b), (distance, hashes.shape, groups, hot)


def test_too_few_keys_lose_pairs() -> None:
    """The control of the test above: radii that do not add up miss pairs."""
    hashes = np.random.default_rng(3).integers(0, 256, (2, 8), dtype=np.uint8)
    hashes[1] = hashes[0] ^ np.uint8(1)  # a bit of every byte
    assert len(all_pairs(hashes, 8)[0]) == 1
    assert len(banded_pairs(hashes, 8, (Group(8, 1),))[0]) == 1
    assert len(banded_pairs(hashes, 8, (Group(7, 1),))[0]) == 0


@pytest.mark.parametrize("distance", [1, 4, 6])
def test_every_few_bits_spare_a_key(distance: int) -> None:
    rng, bits = np.random.default_rng(distance), tuple(range(64))
    for n in (3_000, 100_000, 10**6, 10**7, 10**9):
        keys = [set(key) for key in keys_of(bits, plan_groups(64, distance, n))]
        for _ in range(500):
            differ = set(rng.choice(64, distance, replace=False).tolist())
            assert any(not key & differ for key in keys)


def test_keys_grow_so_that_candidates_stay_in_proportion_to_rows() -> None:
    """Of 64 bits and distance 4: rows a key names beside each stay few, and the cost grows almost as the rows do."""
    costs = []
    for n in (10**6, 10**7, 10**8, 10**9):
        groups = plan_groups(64, 4, n)
        keys = list(keys_of(tuple(range(64)), groups))
        assert max(n / 2 ** len(key) for key in keys) < 30, groups
        assert len(keys) <= 35
        costs.append(seconds(groups, 64, n))
    assert max(np.diff(np.log10(costs))) < 1.25
    plain = seconds((Group(4, 1),), 64, 10**9)
    assert plain > 500 * costs[-1]


def test_a_hot_bucket_is_searched_by_the_bits_that_are_left() -> None:
    rng = np.random.default_rng(5)
    hashes = rng.integers(0, 256, (40_000, 8), dtype=np.uint8)
    hashes[:, :4] = hashes[0, :4]  # every key of these bits is one bucket
    i, j, distance = near_pairs(hashes, 4)
    chosen = rng.choice(len(hashes), 200, replace=False)
    for row in chosen:  # all others of some rows, plainly
        away = np.unpackbits(hashes ^ hashes[row], axis=1).sum(axis=1)
        found = set(i[j == row].tolist()) | set(j[i == row].tolist())
        assert found == set(np.flatnonzero(away <= 4).tolist()) - {row}
    assert len(set(zip(i.tolist(), j.tolist(), strict=True))) == len(i) > 1000
    assert distance.max() == 4

"""Which bits of two hashes must agree for the pair to be looked at: keys of an exact Hamming search (pigeonhole, twice).

Cut the bits into groups with radii r_g where sum (r_g + 1) > d: hashes that differ in at most d bits differ in at most
r_g bits of some group. Cut that group into r_g + k_g bands: at least k_g of them agree. Every k_g bands of every group are
a key. k = 1 is plain banding, whose keys of 64 / (d + 1) bits give n^2 candidates; with more bands to a key, keys grow with
log2 n and candidates stay in proportion to n. How many is chosen for the number of hashes by what it costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise
from math import comb
from typing import NamedTuple

MAX_JOINED, MAX_KEYS = 6, 128
PASS_SECONDS, ROW_SECONDS, PAIR_SECONDS = 2e-4, 1.2e-8, 8e-10  # about, of one key on one core; they only choose the way

Bits = tuple[int, ...]


class Group(NamedTuple):
    """Part of a hash that may differ in `radius` bits, cut into radius + joined bands of which `joined` make a key."""

    radius: int
    joined: int

    @property
    def num_bands(self) -> int:
        """Bands of this group."""
        return self.radius + self.joined

    @property
    def num_keys(self) -> int:
        """Keys of this group."""
        return comb(self.num_bands, self.joined)


def plan_groups(num_bits: int, max_distance: int, n: int) -> tuple[Group, ...]:
    """The cheapest groups for n hashes of so many bits; none where comparing all with all is cheaper."""
    plans: list[tuple[Group, ...]] = [()]
    for count in range(1, max_distance + 2):
        radius, wider = divmod(max_distance + 1, count)  # `wider` groups have this radius, the others one less
        for joined in range(1, MAX_JOINED + 1):
            for joined_wider in range(1, MAX_JOINED + 1 if wider else 2):
                plan = (Group(radius - 1, joined),) * (count - wider) + (Group(radius, joined_wider),) * wider
                if sum(group.num_keys for group in plan) <= MAX_KEYS and sum(g.num_bands for g in plan) <= num_bits:
                    plans.append(plan)
    return min(plans, key=lambda plan: seconds(plan, num_bits, n))


def seconds(groups: tuple[Group, ...], num_bits: int, n: int) -> float:
    """Expected seconds among n uniform hashes, all with all for no groups: per key a sort of rows and its candidates."""
    if not groups:
        return n * n / 2 * PAIR_SECONDS + n * PASS_SECONDS / 16
    key_bits = num_bits / sum(group.num_bands / group.joined for group in groups)
    one: float = PASS_SECONDS + n * ROW_SECONDS + n * n / 2 * 2.0**-key_bits * PAIR_SECONDS
    return one * sum(group.num_keys for group in groups)


def keys_of(bits: Bits, groups: tuple[Group, ...]) -> Iterator[Bits]:
    """Every key as the places of its bits; bands of a group are as wide as gives all groups keys of the same width."""
    unit = len(bits) / sum(group.num_bands / group.joined for group in groups)
    start = 0.0
    for group in groups:
        edges = [round(start + band * unit / group.joined) for band in range(group.num_bands + 1)]
        start += group.num_bands * unit / group.joined
        bands = [bits[low:high] for low, high in pairwise(edges)]
        yield from (sum(chosen, ()) for chosen in combinations(bands, group.joined))


def runs(bits: Bits) -> Iterator[tuple[int, int]]:
    """Places as runs (first, how many) of neighbours that ascend."""
    first = 0
    for end in range(1, len(bits) + 1):
        if end == len(bits) or bits[end] != bits[end - 1] + 1:
            yield bits[first], end - first
            first = end

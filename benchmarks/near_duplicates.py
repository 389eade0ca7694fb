"""Near-duplicate search: all pairs within distance 4 of 64-bit hashes, exactly, against faiss on one thread.

value: CPU seconds of faiss' flat binary range search over ours at 100,000 uniform hashes with 5 % planted neighbours
(bar 20); beside it, against faiss' multi-hash at its best setting of those tried (bar 4), exactness against all pairs
at 10,000 uniform and skewed hashes, and how time and memory grow from 1 to 10 million (bars: exponent 1.2, 8 GiB).
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.record import record
from data_curation.hamming import all_pairs, near_pairs
from infra.memory import forget_peak_memory, peak_memory

SEED, DISTANCE, ROUNDS = 0, 4, 3
BAR, MULTI_HASH_BAR, EXPONENT_BAR, MEMORY_BAR = 20.0, 4.0, 1.2, 8 << 30
MULTI_HASH = ((5, 12, 0), (4, 16, 1), (4, 14, 1))  # hashes, bits of each, bits flipped


def hashes(count: int, rng: np.random.Generator, skewed: bool = False) -> NDArray[np.uint8]:
    """64-bit hashes [count, 8]; 5 % are copies within the distance; skewed: a tenth share half their bits, some all."""
    values = rng.integers(0, 256, (count, 8), dtype=np.uint8)
    if skewed:
        values[: count // 10, :4] = values[0, :4]
        values[count // 10 : count // 8] = values[0]
    copies = count // 20
    flips = np.zeros((copies, 64), np.uint8)
    for _ in range(DISTANCE):
        flips[np.arange(copies), rng.integers(0, 64, copies)] ^= 1
    values[-copies:] = values[count // 2 : count // 2 + copies] ^ np.packbits(flips, axis=1)
    return values


def cpu_seconds(work: Callable[[], Any]) -> float:
    """CPU seconds of one call."""
    began = time.process_time()
    work()
    return time.process_time() - began


def faiss_pairs(index: Any, values: NDArray[np.uint8]) -> set[tuple[int, int]]:
    """Pairs i < j that a faiss index finds; its radius is exclusive."""
    limits, _, found = index.range_search(values, DISTANCE + 1)
    i = np.repeat(np.arange(len(values)), np.diff(limits.astype(np.int64)))
    return {(a, b) for a, b in zip(i.tolist(), found.tolist(), strict=True) if a < b}


def against_faiss(values: NDArray[np.uint8]) -> dict[str, Any]:
    """Seconds of ours, of flat and of each multi-hash setting, taken in turn; which settings found every pair."""
    import faiss

    faiss.omp_set_num_threads(1)
    flat = faiss.IndexBinaryFlat(64)
    flat.add(values)
    i, j, _ = near_pairs(values, DISTANCE)
    ours = set(zip(i.tolist(), j.tolist(), strict=True))
    assert ours == faiss_pairs(flat, values), "flat search found other pairs"
    settings = {}
    for setting in MULTI_HASH:
        index = faiss.IndexBinaryMultiHash(64, *setting[:2])
        index.nflip = setting[2]
        index.add(values)
        settings[setting] = index
    complete = {setting: faiss_pairs(index, values) == ours for setting, index in settings.items()}
    seconds: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        seconds.setdefault("ours", []).append(cpu_seconds(lambda: near_pairs(values, DISTANCE)))
        for setting, index in settings.items():
            name = "multi-hash {}x{}, {} flipped".format(*setting)
            took = cpu_seconds(lambda index=index: index.range_search(values, DISTANCE + 1))  # type: ignore[misc]
            seconds.setdefault(name, []).append(took)
    seconds["flat"] = [cpu_seconds(lambda: flat.range_search(values, DISTANCE + 1)) for _ in range(2)]
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    exact = [medians["multi-hash {}x{}, {} flipped".format(*setting)] for setting in MULTI_HASH if complete[setting]]
    return {"seconds": medians, "pairs": len(ours), "multi_hash_best": min(exact, default=None),
            "complete": ["{}x{}, {} flipped".format(*s) for s in MULTI_HASH if complete[s]]}  # fmt: skip


def growth(rng: np.random.Generator) -> dict[str, Any]:
    """Median CPU seconds and peak memory at 1 and 10 million hashes."""
    rows = {}
    for count in (1_000_000, 10_000_000):
        values = hashes(count, rng)
        forget_peak_memory()
        pairs: list[int] = []
        seconds = [
            cpu_seconds(lambda values=values, pairs=pairs: pairs.append(len(near_pairs(values, DISTANCE)[0])))  # type: ignore[misc]
            for _ in range(ROUNDS)
        ]
        rows[count] = {"seconds": statistics.median(seconds), "pairs": pairs[0], "peak_memory_bytes": peak_memory()}
    first, last = rows.values()
    return {"rows": rows, "exponent": math.log10(last["seconds"] / first["seconds"])}


def main() -> dict[str, Any]:
    """Exactness, then speed, then growth."""
    rng = np.random.default_rng(SEED)
    exact = {}
    for kind in ("uniform", "skewed"):
        values = hashes(10_000, rng, kind == "skewed")
        ours, plain = near_pairs(values, DISTANCE), all_pairs(values, DISTANCE)
        exact[kind] = {
            "equal": all(np.array_equal(a, b) for a, b in zip(ours, plain, strict=True)),
            "pairs": len(plain[0]),
        }
    compared, grown = against_faiss(hashes(100_000, rng)), growth(rng)
    ours, flat, multi = compared["seconds"]["ours"], compared["seconds"]["flat"], compared["multi_hash_best"]
    met = (
        all(found["equal"] for found in exact.values())
        and flat / ours >= BAR and multi is not None and multi / ours >= MULTI_HASH_BAR
        and grown["exponent"] <= EXPONENT_BAR and grown["rows"][10_000_000]["peak_memory_bytes"] < MEMORY_BAR
    )  # fmt: skip
    detail = {
        "exact_at_10k": exact,
        "at_100k": compared,
        "over_multi_hash": multi and round(multi / ours, 3),
        "growth": grown,
    }
    return record("near_duplicates", [SEED], flat, ours, BAR, met, detail)


if __name__ == "__main__":
    print(json.dumps(main()))

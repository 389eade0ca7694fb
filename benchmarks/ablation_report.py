"""What the arms of `ablations` are worth: means, paired differences with 95 % t-intervals over seeds, the .6x bar."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.record import record
from models.evaluation.intervals import paired

SHIPPED, PLAIN, FASTER = "shipped", "plain", "shipped, .6 of plain's time"
# arm -> the arm it is compared with, where that is not the shipped recipe
AGAINST = {FASTER: PLAIN, "40 px, no shift": "40 px", "curriculum": "40 px"}
LARGE = "large"


def compared_with(arm: str) -> str:
    """The arm another one is told apart from."""
    return AGAINST.get(arm, LARGE if arm.startswith(f"{LARGE},") else SHIPPED)


def summarise(
    results: Sequence[Mapping[str, Any]], seconds: Mapping[str, float], about: Mapping[str, Any]
) -> dict[str, Any]:  # fmt: skip
    """Write results/ablations.json; seeds in which an arm is missing are left out of that arm's difference."""
    final = {(each["arm"], each["seed"]): float(each["curve"][-1][1]) for each in results}
    steps = {each["arm"]: each["steps"] for each in results}
    arms = {}
    for arm in steps:
        seeds = [seed for (name, seed) in final if name == arm]
        common = sorted(seed for seed in seeds if (compared_with(arm), seed) in final)
        own, other = ([final[name, seed] for seed in common] for name in (arm, compared_with(arm)))
        arms[arm] = {
            "accuracy": [final[arm, seed] for seed in sorted(seeds)], "mean": round(statistics.fmean(own or [0.0]), 4),
            "steps": steps[arm], "cpu_seconds": round(seconds[arm], 1), "against": compared_with(arm),
            "difference": paired(own, other) if len(common) > 1 and arm != compared_with(arm) else None,
            "curves": {str(each["seed"]): each["curve"] for each in results if each["arm"] == arm},
        }  # fmt: skip
    fast, plain = (arms[name]["mean"] if name in arms else 0.0 for name in (FASTER, PLAIN))
    seeds = sorted({seed for _, seed in final})
    return record("ablations", seeds, fast, plain, plain, fast >= plain > 0, {**about, "arms": arms})

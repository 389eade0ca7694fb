"""What the arms of `ablations` are worth: means, paired differences with 95 % t-intervals over seeds, the .6x bar.

The bar: the shipped recipe is at least as accurate as a plain one that had twice its time, so it needs half of it.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.record import record
from models.evaluation.intervals import paired

SHIPPED, PLAIN = "shipped", "plain, twice the time"
OTHERS = ("40 px", "small", "curriculum")  # families of arms with a first one of their own


def compared_with(arm: str) -> str:
    """The arm another one is told apart from."""
    family = arm.partition(",")[0]
    return {"curriculum": "40 px"}.get(family, family if family in OTHERS else SHIPPED)


def summarise(
    results: Sequence[Mapping[str, Any]], seconds: Mapping[str, float], about: Mapping[str, Any]
) -> dict[str, Any]:  # fmt: skip
    """Write results/ablations.json; seeds in which an arm is missing are left out of that arm's difference."""
    final = {(each["arm"], each["seed"]): each["curve"][-1][1:] for each in results}
    steps = {each["arm"]: each["steps"] for each in results}
    arms = {}
    for arm in steps:
        other = compared_with(arm)
        seeds = sorted(seed for (name, seed) in final if name == arm)
        common = [seed for seed in seeds if arm != other and (other, seed) in final]
        arms[arm] = {
            "steps": steps[arm], "cpu_seconds": round(seconds[arm], 1), "against": other,
            "curves": {str(each["seed"]): each["curve"] for each in results if each["arm"] == arm},
        }  # fmt: skip
        for place, metric in enumerate(("accuracy", "reward")):
            own, theirs = ([final[name, seed][place] for seed in common] for name in (arm, other))
            arms[arm] |= {
                metric: [final[arm, seed][place] for seed in seeds],
                f"{metric}_mean": round(statistics.fmean(final[arm, seed][place] for seed in seeds), 4),
                f"{metric}_difference": paired(own, theirs) if len(common) > 1 else None,
            }
    fast, plain = (arms[name]["accuracy_mean"] if name in arms else 0.0 for name in (SHIPPED, PLAIN))
    seeds = sorted({seed for _, seed in final})
    return record("ablations", seeds, fast, plain, plain, fast >= plain > 0, {**about, "arms": arms})

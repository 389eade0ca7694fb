"""Every distillation method of presets/distill-all.yaml against its teacher at 50 guided steps, same prompts and noise.

value: prompt accuracy on the basic vocabulary of the best one-step student; peer: the teacher's at 50 steps; bar: 0.98 of
it, and the figures beside it (full vocabulary, four steps, distances, speed-up, families that beat the teacher).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.lifecycle_runs import PRESET, run_preset
from benchmarks.record import record

SEED = 0
FAMILIES = {"progressive": ("progressive",), "instaflow": ("instaflow",), "consistency": ("consistency", "scm"),
            "dmd": ("dmd",), "add": ("add",)}  # fmt: skip
BARS = {"basic_1": 0.98, "full_1": 0.95, "basic_4": 0.99, "full_4": 0.99, "speed_up_4": 20.0, "speed_up_1": 80.0}
LATENCY_BATCH = "8"  # pictures drawn at a time, the sampler's batch size; one at a time is in the detail
DISTANCE_BARS = {"distance_4": 1.3, "distance_1": 2.0}  # at most


def main() -> dict[str, Any]:
    """Read the comparison of one run."""
    run = run_preset(PRESET.with_name("distill-all.yaml"), SEED)
    entry = next(stage for stage in run["stages"] if stage["name"] == "compare")
    folder = Path(entry["uri"].removeprefix("file://"))
    comparison = json.loads((folder / "comparison.json").read_text())
    facts = json.loads((folder / "artifact.json").read_text())["facts"]
    for label, speed in facts["speed_up"][LATENCY_BATCH].items():
        comparison["ratios"][label]["speed_up"] = speed
    figures, best = figures_of(comparison), best_of(comparison, 1)
    rows, top = comparison["rows"], comparison["reference"]
    value, peer = (rows[label]["prompt_accuracy"]["value"] for label in (best, top))
    met = all(figure["met"] for figure in figures)
    detail = {"figures": figures, "best": {"1": best, "4": best_of(comparison, 4)}, "rows": rows,
              "ratios": comparison["ratios"], "speed_up": facts["speed_up"], "latency": facts["latency"], "training": facts["training"]}  # fmt: skip
    return record("distillation", [SEED], value, peer, BARS["basic_1"], met, detail)


def best_of(comparison: dict[str, Any], steps: int) -> str:
    """The student that keeps most of both vocabularies at this number of steps."""
    ratios = {
        label: ratio for label, ratio in comparison["ratios"].items()
        if comparison["rows"][label]["steps"] == steps and not label.startswith("teacher@")
    }  # fmt: skip
    return max(ratios, key=lambda label: (ratios[label]["basic"] or 0) + (ratios[label]["full"] or 0))


def figures_of(comparison: dict[str, Any]) -> list[dict[str, Any]]:
    """One figure per bar."""
    figures = []
    for name, bar in (BARS | DISTANCE_BARS).items():
        key, steps = name.rsplit("_", 1)
        value = comparison["ratios"][best_of(comparison, int(steps))][key]
        met = value is not None and (value <= bar if name in DISTANCE_BARS else value >= bar)
        figures.append({"name": name, "value": value, "bar": bar, "met": met})
    passed = {comparison["rows"][v["row"]]["method"] for v in comparison["verdicts"] if v["passed"] and v["own"]}
    beaten = [family for family, methods in FAMILIES.items() if passed & set(methods)]
    figures.append({"name": "families_that_beat_the_teacher", "value": len(beaten), "bar": len(FAMILIES),
                    "met": len(beaten) == len(FAMILIES), "families": beaten})  # fmt: skip
    return figures


if __name__ == "__main__":
    print(json.dumps(main()))

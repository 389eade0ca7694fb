"""Three whole demo lifecycles that differ in their seed alone; the benchmarks of the techniques read their scores.

Stages that are there already are reused, so the first of these benchmarks pays for all of them.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

PRESET = Path(__file__).resolve().parents[1] / "presets" / "demo.yaml"
SEEDS = (0, 1, 2)
GATE_MISSED = 4


@functools.cache
def lifecycle(seed: int) -> dict[str, Any]:
    """The final JSON line of `t2i run presets/demo.yaml` with this seed."""
    command = [str(Path(sys.executable).with_name("t2i")), "run", str(PRESET), "--set", f"seed={seed}", "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in (0, GATE_MISSED):
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}; run it by hand to see why")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def score(seed: int, stage: str, metric: str) -> float:
    """One score of one stage."""
    return float(lifecycle(seed)["scores"][stage][metric]["value"])


def made_in(seed: int, *stages: str) -> float:
    """Seconds the stages took when they were made (facts of their artifacts, also when they are reused)."""
    entries = {entry["name"]: entry for entry in lifecycle(seed)["stages"]}
    records = [
        json.loads((Path(entries[name]["uri"].removeprefix("file://")) / "artifact.json").read_text())
        for name in stages
    ]
    return float(sum(record["facts"]["seconds"] for record in records))


def mean(values: list[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)

"""Three demo lifecycles that differ in their seed alone; the benchmarks of the techniques read their scores.

Stages that are there already are reused, so the first of these benchmarks pays for all of them. `pretraining` stops after
pre-training: its stages are the very ones of the whole lifecycle, and it costs half.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

PRESET = Path(__file__).resolve().parents[1] / "presets" / "demo.yaml"
SEEDS = (0, 1, 2)
PRETRAINING = ("pretrain-32", "pretrain-40")
GATE_MISSED = 4


@functools.cache
def lifecycle(seed: int) -> dict[str, Any]:
    """The final JSON line of `t2i run presets/demo.yaml` with this seed."""
    return run_preset(PRESET, seed)


@functools.cache
def pretraining(seed: int) -> dict[str, Any]:
    """The same for the demo's preset cut off after pre-training."""
    preset = yaml.safe_load(PRESET.read_text())
    preset |= {"name": "demo-pretraining", "personalize": [], "distill": [], "posttrain": {"sft": None, "dpo": None}}
    preset["pretrain"] = [stage for stage in preset["pretrain"] if stage["name"] in PRETRAINING]
    sets = [{**chosen, "stages": None} for chosen in preset["evaluate"]["sets"] if chosen["name"] != "long"]
    preset["evaluate"] |= {"sets": sets, "subjects": [], "gates": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "demo-pretraining.yaml")
        path.write_text(yaml.safe_dump(preset))
        return run_preset(path, seed)


def run_preset(preset: Path, seed: int) -> dict[str, Any]:
    """The final JSON line of `t2i run` with this preset and seed."""
    command = [str(Path(sys.executable).with_name("t2i")), "run", str(preset), "--set", f"seed={seed}", "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in (0, GATE_MISSED):
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}; run it by hand to see why")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def score(run: dict[str, Any], stage: str, metric: str) -> float:
    """One score of one stage of a run."""
    return float(run["scores"][stage][metric]["value"])


def made_in(run: dict[str, Any], *stages: str) -> float:
    """Seconds the stages took when they were made (facts of their artifacts, also when they are reused)."""
    entries = {entry["name"]: entry for entry in run["stages"]}
    records = [
        json.loads((Path(entries[name]["uri"].removeprefix("file://")) / "artifact.json").read_text())
        for name in stages
    ]
    return float(sum(record["facts"]["seconds"] for record in records))


def mean(values: list[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)

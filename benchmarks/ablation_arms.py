"""The arms of `ablations`: what each changes in the demo's recipe, and what it costs on a CPU."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from infra.config import parse
from models.pretraining.config import FlowMatchingConfig

PRESET = Path(__file__).resolve().parents[1] / "presets" / "demo.yaml"
STEPS = int(os.environ.get("T2I_ABLATION_STEPS", "1200"))
LOOKS = int(os.environ.get("T2I_ABLATION_LOOKS", "6"))

Changes = dict[str, Any]
PLAIN: Changes = {"timesteps.density": "uniform", "timesteps.stratified": False, "repa": None,
                  "train.optimizer.muon_lr": None, "train.optimizer.adamw_lr": 0.003}  # fmt: skip
FORTY: Changes = {"repa": None, "select.resolutions": [40], "sampling.side": 40}
LARGE: Changes = {"network.hidden_size": 192, "network.depth": 6, "network.num_heads": 6}
# arm -> (what it changes in the shipped recipe, the arm whose CPU time it must not exceed, by what share)
ARMS: dict[str, tuple[Changes, tuple[str, float] | None]] = {
    "shipped": ({}, None),
    "uniform times": ({"timesteps.density": "uniform"}, None),
    "unstratified": ({"timesteps.stratified": False}, None),
    "no REPA": ({"repa": None}, None),
    "no REPA, equal time": ({"repa": None}, ("shipped", 1.0)),
    "REPA to the end": ({"repa.until": 1.0}, None),
    "REPA late": ({"repa.layer": 3}, None),
    "iREPA": ({"repa.projector": "conv", "repa.spatial_norm": 1.0}, None),
    "dispersive": ({"repa.kind": "dispersive", "repa.coefficient": 0.25}, None),
    "self-alignment": ({"repa.kind": "self", "repa.coefficient": 0.2}, None),
    "AdamW": ({"train.optimizer.muon_lr": None}, None),
    "AdamW, twice the rate": ({"train.optimizer.muon_lr": None, "train.optimizer.adamw_lr": 0.003}, None),
    "AdamW, equal time": ({"train.optimizer.muon_lr": None, "train.optimizer.adamw_lr": 0.003}, ("shipped", 1.0)),
    "TREAD": ({"tread": {"share": 0.5, "first": 1, "last": 2}}, None),
    "TREAD, equal time": ({"tread": {"share": 0.5, "first": 1, "last": 2}}, ("shipped", 1.0)),
    "plain": (PLAIN, None),
    "plain, equal time": (PLAIN, ("shipped", 1.0)),
    "shipped, .6 of plain's time": ({}, ("plain", 0.6)),
    "40 px": (FORTY, None),
    "40 px, no shift": (FORTY | {"timesteps.shift": "none"}, None),
    "curriculum": (
        FORTY | {"select.resolutions": [32], "curriculum": [
            {"from_samples": 0},
            {"from_samples": 0.7, "select": {"resolutions": [32, 40], "shares": [0.3, 0.7], "domains": ["basic"]}},
        ]},
        ("40 px", 1.0),
    ),
    "large": (LARGE, None),
    "large, no REPA": (LARGE | {"repa": None}, None),
    "large, no REPA, equal time": (LARGE | {"repa": None}, ("large", 1.0)),
    "large, REPA to the end": (LARGE | {"repa.until": 1.0}, None),
    "large, REPA late": (LARGE | {"repa.layer": 5}, None),
}  # fmt: skip


def recipe(changes: Changes, steps: int, seed: int) -> FlowMatchingConfig:
    """The demo's first stage with these changes by dotted path, as one run of `steps` that ends at a low rate."""
    data = yaml.safe_load(PRESET.read_text())["pretrain"][0]
    data["repa"] |= {"teacher": "packaged"}  # made while training: a GPU has time for it, and the folder stays small
    base = {"train.optimizer.decay_from": 0.5, "train.optimizer.final_ratio": 0.03, "train.steps": steps,
            "train.seed": seed, "train.sample_every": None, "select.long_captions": 0.0, "select.domains": ["basic"]}  # fmt: skip
    for path, value in {**base, **changes}.items():
        *parents, last = path.split(".")
        here = data
        for part in parents:
            here = here.setdefault(part, {})
        here[last] = value
    if data.get("repa") and data["repa"].get("kind", "teacher") != "teacher":
        data["repa"].pop("teacher")
    samples = steps * data["train"]["batch_size"]
    for phase in data.get("curriculum", ()):
        phase["from_samples"] = round(phase["from_samples"] * samples)
    return parse(FlowMatchingConfig, data, "ablation")


def steps_of(name: str, cost: Mapping[str, float], pictures: int) -> int:
    """Steps of an arm: all, or those that another arm's CPU time pays for."""
    limit = ARMS[name][1]
    if limit is None:
        return STEPS
    other, share = limit
    spare = share * cpu_seconds(other, STEPS, cost, pictures) - cpu_seconds(name, 0, cost, pictures)
    return max(LOOKS, round(spare / step_cost(name, cost)))


def with_teacher(name: str) -> bool:
    """Whether an arm reads a teacher's features, which the encode stage makes once a picture."""
    repa = recipe(ARMS[name][0], STEPS, 0).repa
    return repa is not None and repa.kind == "teacher"


def step_cost(name: str, cost: Mapping[str, float]) -> float:
    """Seconds a step with cached features: without the teacher's share, which `costs` saw made on the fly."""
    config = recipe(ARMS[name][0], STEPS, 0)
    made = config.repa.until * config.train.batch_size if config.repa is not None and with_teacher(name) else 0.0
    alike = [cost[other] for other, (changes, _) in ARMS.items() if changes == ARMS[name][0]]
    return statistics.fmean(alike) - made * cost["teacher"]


def cpu_seconds(name: str, steps: int, cost: Mapping[str, float], pictures: int) -> float:
    """What so many steps of an arm take on one core, its teacher's features included."""
    return steps * step_cost(name, cost) + (pictures * cost["teacher"] if with_teacher(name) else 0.0)

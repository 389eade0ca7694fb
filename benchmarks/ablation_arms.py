"""The arms of `ablations`: what each changes in the demo's recipe, and what it costs on a CPU."""

from __future__ import annotations

import copy
import os
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from flows.ablate import SWITCHES
from infra.config import parse, put
from models.pretraining.config import FlowMatchingConfig

PRESET = Path(__file__).resolve().parents[1] / "presets" / "demo.yaml"
STEPS = int(os.environ.get("T2I_ABLATION_STEPS", "1200"))
LOOKS = int(os.environ.get("T2I_ABLATION_LOOKS", "6"))

Changes = dict[str, Any]
FORTY: Changes = {"repa": None, "select.resolutions": [40], "sampling.side": 40}
WITHOUT = {name: lacking for name, (_, lacking) in SWITCHES.items()}
ADAMW: Changes = WITHOUT["muon"] | {"train.optimizer.adamw_lr": 0.003}
PLAIN: Changes = ADAMW | WITHOUT["density"] | WITHOUT["stratified"] | WITHOUT["repa"]
TREAD: Changes = SWITCHES["tread"][0]
CURRICULUM: Changes = FORTY | {"select.resolutions": [32], "curriculum": [
    {"from_samples": 0},
    {"from_samples": 0.7, "select": {"resolutions": [32, 40], "shares": [0.3, 0.7], "domains": ["basic"]}},
]}  # fmt: skip
SMALL: Changes = {"network.hidden_size": 96, "network.depth": 3, "network.num_heads": 3}
# arm -> (what it changes in the shipped recipe, the arm whose CPU time it must not exceed, by what share); what decides comes first
ARMS: dict[str, tuple[Changes, tuple[str, float] | None]] = {
    "shipped": ({}, None),
    "uniform times": (WITHOUT["density"], None),
    "no REPA, equal time": (WITHOUT["repa"], ("shipped", 1.0)),
    "AdamW, equal time": (ADAMW, ("shipped", 1.0)),
    "TREAD, equal time": (TREAD, ("shipped", 1.0)),
    "plain, twice the time": (PLAIN, ("shipped", 2.0)),
    "40 px": (FORTY, None),
    "40 px, no shift": (FORTY | WITHOUT["shift"], None),
    "curriculum, equal time": (CURRICULUM, ("40 px", 1.0)),
    "REPA to the end": (WITHOUT["repa-stop"], None),
    "REPA late": ({"repa.layer": 3}, None),
    "small": (SMALL, None),
    "small, no REPA, equal time": (SMALL | WITHOUT["repa"], ("small", 1.0)),
    "no REPA": (WITHOUT["repa"], None),
    "AdamW": (ADAMW, None),
    "TREAD": (TREAD, None),
    "curriculum": (CURRICULUM, None),
    "small, no REPA": (SMALL | WITHOUT["repa"], None),
    "small, REPA late": (SMALL | {"repa.layer": 2}, None),
    "plain, equal time": (PLAIN, ("shipped", 1.0)),
    "small, REPA to the end": (SMALL | WITHOUT["repa-stop"], None),
    "velocity": ({"objective.kind": "velocity"}, None),
    "DDPM, eps": ({"objective.kind": "ddpm_eps"}, None),
    "DDPM, v": ({"objective.kind": "ddpm_v"}, None),
    "EDM": ({"objective.kind": "edm"}, None),
    "unstratified": (WITHOUT["stratified"], None),
    "shipped in float32": ({"train.precision": "fp32"}, None),
    "AdamW, half the rate": (ADAMW | {"train.optimizer.adamw_lr": 0.0015}, None),
    "iREPA": (SWITCHES["irepa"][0], None),
    "dispersive": ({"repa.kind": "dispersive", "repa.coefficient": 0.25}, None),
    "self-alignment": ({"repa.kind": "self", "repa.coefficient": 0.2}, None),
}  # fmt: skip


def recipe(changes: Changes, steps: int, seed: int) -> FlowMatchingConfig:
    """The demo's first stage with these changes by dotted path, as one run of `steps` that ends at a low rate."""
    data = yaml.safe_load(PRESET.read_text())["pretrain"][0]
    base = {"train.optimizer.decay_from": 0.5, "train.optimizer.final_ratio": 0.03, "train.steps": steps,
            "train.seed": seed, "train.precision": "bf16", "train.sample_every": None, "select.long_captions": 0.0, "select.domains": ["basic"]}  # fmt: skip
    for path, value in {**base, **changes}.items():
        put(data, path, copy.deepcopy(value), "ablation")
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
    return repa is not None and repa.needs_cached_features


def step_cost(name: str, cost: Mapping[str, float]) -> float:
    """Seconds a step, the mean of all arms with this recipe."""
    return statistics.fmean(cost[other] for other, (changes, _) in ARMS.items() if changes == ARMS[name][0])


def cpu_seconds(name: str, steps: int, cost: Mapping[str, float], pictures: int) -> float:
    """What so many steps of an arm take on one core, its teacher's features included."""
    return steps * step_cost(name, cost) + (pictures * cost["teacher"] if with_teacher(name) else 0.0)

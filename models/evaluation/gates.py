"""Gates: bounds on a stage's scores, absolute or against its parent on the same prompts and seeds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

import numpy as np

from models.evaluation.collapse import collapsed
from models.evaluation.config import GateConfig
from models.evaluation.density_coverage import mode_share
from models.evaluation.intervals import Score, bootstrap

MOST_SPOILT = 0.5  # share of black, constant, noisy or copied pictures
LEAST_MODES = 0.6  # effective number of different pictures over that of real ones; sound runs have about 1

Scores = Mapping[str, Mapping[str, Score]]  # stage -> metric -> score
Answers = Mapping[str, Mapping[str, np.ndarray]]  # stage -> metric -> value per (prompt, seed), same order everywhere


class Verdict(TypedDict):
    """The outcome of one gate with the reason in words."""

    stage: str
    metric: str
    passed: bool
    value: float | None
    reason: str
    difference: Score | None


def paired_difference(
    child: np.ndarray, parent: np.ndarray, resamples: int = 500, rng: np.random.Generator | None = None
) -> Score:
    """Mean of child - parent over the same prompts and seeds, with a paired bootstrap interval."""
    if child.shape != parent.shape:
        raise ValueError(f"{len(child)} and {len(parent)} answers are not paired; ask both the same prompts")
    delta = child.astype(float) - parent.astype(float)
    return bootstrap((delta,), lambda x: float(x.mean()), resamples, rng or np.random.default_rng(0))


def judge_collapse(stage: str, images: np.ndarray, real: np.ndarray) -> Verdict:
    """Are these pictures at all, and different ones for different prompts; uint8 [N, S, S, 3] and renders of the same."""
    kinds = {name: float(values.mean()) for name, values in collapsed(images).items()}
    modes = mode_share(images, real)
    faults = []
    if kinds["any"] > MOST_SPOILT:
        worst = max(("black", "constant", "noise", "copy"), key=lambda name: kinds[name])
        faults.append(f"{kinds['any']:.0%} of the pictures are black, constant, noise or copies (most: {worst})")
    if modes < LEAST_MODES:
        faults.append(f"different prompts give {modes:.2f} of the variety of real pictures, below {LEAST_MODES:g}")
    reason = "; ".join(faults) or f"{kinds['any']:.0%} spoilt pictures, {modes:.2f} of the variety of real ones"
    return Verdict(stage=stage, metric="collapse", passed=not faults, value=modes, reason=reason, difference=None)


def judge_gate(gate: GateConfig, scores: Scores, answers: Answers) -> Verdict:
    """Does the stage keep the gate's bounds; a missing score fails: a gate that cannot be read protects nothing."""
    own = scores.get(gate.stage, {}).get(gate.metric)
    if own is None:
        return _verdict(gate, None, [f"{gate.stage} has no {gate.metric}; check the gate's names and the prompt sets"])
    value, faults, difference = own["value"], [], None
    if gate.minimum is not None and value < gate.minimum:
        faults.append(f"{value:.3f} is below the minimum {gate.minimum:g}")
    if gate.maximum is not None and value > gate.maximum:
        faults.append(f"{value:.3f} is above the maximum {gate.maximum:g}")
    if gate.parent is not None:
        other = scores.get(gate.parent, {}).get(gate.metric)
        if other is None:
            return _verdict(gate, value, [f"parent {gate.parent} has no {gate.metric}; ask it the same prompt set"])
        faults += _against_parent(gate, value, other["value"])
        pair = [answers.get(stage, {}).get(gate.metric) for stage in (gate.stage, gate.parent)]
        if pair[0] is not None and pair[1] is not None:
            difference = paired_difference(pair[0], pair[1])
    return _verdict(gate, value, faults, difference)


def _against_parent(gate: GateConfig, value: float, parent: float) -> list[str]:
    faults = []
    if gate.parent_drop is not None and value < parent - gate.parent_drop - 1e-9:
        faults.append(f"{value:.3f} is below {gate.parent}'s {parent:.3f} less {gate.parent_drop:g}")
    if gate.parent_ratio is not None and value < parent * gate.parent_ratio - 1e-9:
        faults.append(f"{value:.3f} is below {gate.parent_ratio:g} of {gate.parent}'s {parent:.3f}")
    return faults


def _bounds(gate: GateConfig) -> str:
    parts = []
    if gate.minimum is not None:
        parts.append(f">= {gate.minimum:g}")
    if gate.maximum is not None:
        parts.append(f"<= {gate.maximum:g}")
    if gate.parent_drop is not None:
        parts.append(f">= {gate.parent} {-gate.parent_drop:+g}")
    if gate.parent_ratio is not None:
        parts.append(f">= {gate.parent_ratio:g} x {gate.parent}")
    return " and ".join(parts)


def _verdict(gate: GateConfig, value: float | None, faults: list[str], difference: Score | None = None) -> Verdict:
    reason = "; ".join(faults) or f"keeps {_bounds(gate)}"
    return Verdict(
        stage=gate.stage, metric=gate.metric, passed=not faults, value=value, reason=reason, difference=difference
    )

"""A/B of one switch of pre-training: with and without it, at equal samples and at equal time, over several seeds.

Both arms are stages of this system on one curated training set and one judge, which are reused if they are there. The
third arm, `timed`, repeats `without` with as many steps as `with` had time for. An arm that reads REPA's cached features
pays for its teacher, once a picture of the resolutions it aligns, as if it had the training set to itself.
"""

from __future__ import annotations

import functools
import json
import statistics
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_curation.bucket_facts import parse_bucket
from data_curation.encoders import TEACHER_BATCH, teacher_features
from flows.config import LifecycleConfig
from flows.dag import curation, latents, opening, seeded, training_set
from flows.judged import judge_of
from flows.run import Display, Run
from infra.config import parse, put
from infra.errors import ConfigError
from infra.provenance import provenance
from infra.stages import StageSpec
from models.evaluation.intervals import T_95, paired
from models.pretraining.config import FlowMatchingConfig
from models.pretraining.curriculum import phases_of
from tasks.catalog import spec_of

# switch -> (settings with it, settings without it); an empty side is the preset as it is
SWITCHES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "density": ({}, {"timesteps.density": "uniform"}),
    "shift": ({}, {"timesteps.shift": "none"}),
    "stratified": ({}, {"timesteps.stratified": False}),
    "repa": ({}, {"repa": None}),
    "repa-stop": ({}, {"repa.until": 1.0}),
    "irepa": ({"repa.projector": "conv", "repa.spatial_norm": 1.0}, {}),
    "muon": ({}, {"train.optimizer.muon_lr": None}),
    "tread": ({"tread": {"share": 0.5, "first": 1, "last": 2}}, {}),
    "curriculum": ({"repa": None}, {"select.resolutions": [32, 40], "select.shares": [0.5, 0.5], "repa": None}),
}


def changed(stage: FlowMatchingConfig, changes: Mapping[str, Any], share: float) -> FlowMatchingConfig:
    """The stage with some settings replaced, by dotted path, and `share` of its steps; nothing is set inside null."""
    data = stage.model_dump()
    for path, value in changes.items():
        top, inside, _ = path.partition(".")
        if not inside or data[top] is not None:
            put(data, path, value, f"switch {path!r}")
    train = data["train"]
    train["steps"] = max(1, round(train["steps"] * share))
    return parse(FlowMatchingConfig, data, f"stage {stage.name!r}")


def arm(config: LifecycleConfig, name: str, changes: Mapping[str, Any], seed: int, share: float) -> list[StageSpec]:
    """The chain of pre-training stages of one arm and one seed."""
    specs, init, data = list[StageSpec](), opening(config), training_set(config)
    for stage in config.pretrain:
        own = changed(stage, changes, share).model_copy(update={"name": f"{name}-s{seed}-{stage.name}"})
        specs.append(spec_of(own.name, "flow_matching", seeded(own, config.seed + seed), data=data, **init))
        init = {"init": own.name}
    return specs


def ablate(config: LifecycleConfig, switch: str, seeds: int, share: float, out: Path, display: Display) -> dict[str, Any]:  # fmt: skip
    """Train and judge all arms, write `ablate-<switch>.json` into `out`, and return what it holds."""
    if switch not in SWITCHES:
        raise ConfigError(f"there is no switch {switch!r}; choose one of {', '.join(SWITCHES)}")
    if not 2 <= seeds <= max(T_95):
        raise ConfigError(f"seeds={seeds} is outside 2 to {max(T_95)}; an interval needs several")
    judge = judge_of(config, "arms are")
    having, lacking = SWITCHES[switch]
    base = [*curation(config.data), *latents(config), spec_of("judge", "train_judge", judge)]
    first = {(name, seed): arm(config, name, changes, seed, share)
             for seed in range(seeds) for name, changes in (("with", having), ("without", lacking))}  # fmt: skip
    run = _run(config, [*base, *(spec for chain in first.values() for spec in chain)], switch, display)
    buckets = run.artifacts["encode"].facts["buckets"]
    taught = {key: teacher_seconds(chain, buckets) for key, chain in first.items()}
    spent = {key: taught[key] + sum(_seconds(run, spec) for spec in chain) for key, chain in first.items()}
    ratio = statistics.median(spent["with", seed] / spent["without", seed] for seed in range(seeds))
    timed = {("timed", seed): arm(config, "timed", lacking, seed, share * ratio) for seed in range(seeds)}
    chains = first | timed
    judged = {chain[-1].name: chain[-1].name for chain in chains.values()}
    asked = config.evaluate.model_copy(
        update={"sets": (config.evaluate.sets[0].model_copy(update={"stages": None}),), "subjects": (), "gates": ()}
    )
    score = spec_of("evaluate", "evaluate", asked, judge="judge", data="encode", truth="source", **judged)
    run = _run(config, [*base, *(spec for chain in chains.values() for spec in chain), score], switch, display)
    scores = run.artifacts["evaluate"].facts["scores"]
    accuracy = {key: float(scores[chain[-1].name]["prompt_accuracy"]["value"]) for key, chain in chains.items()}
    result = summary(switch, seeds, accuracy, spent, taught, share)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"ablate-{switch}.json").write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    return result


def summary(
    switch: str, seeds: int, accuracy: Mapping[tuple[str, int], float], spent: Mapping[tuple[str, int], float],
    taught: Mapping[tuple[str, int], float], share: float,
) -> dict[str, Any]:  # fmt: skip
    """Means and paired differences with 95 % t-intervals over the seeds; `taught` is the teacher's part of `spent`."""
    values = {name: [accuracy[name, seed] for seed in range(seeds)] for name in ("with", "without", "timed")}
    code = provenance()["code"]
    return {
        "name": f"ablate-{switch}", "commit": code["commit"] + ("+changes" if code["changed"] else ""),
        "seeds": list(range(seeds)), "metric": "prompt_accuracy", "share_of_steps": share, "accuracy": values,
        "value": statistics.fmean(values["with"]), "peer": statistics.fmean(values["without"]),
        "equal_samples": paired(values["with"], values["without"]),
        "equal_time": paired(values["with"], values["timed"]),
        "seconds": {name: [round(spent[name, seed], 2) for seed in range(seeds)] for name in ("with", "without")},
        "teacher_seconds": {name: round(taught[name, 0], 2) for name in ("with", "without")},
    }  # fmt: skip


@functools.cache
def seconds_a_picture(width: int, height: int) -> float:
    """What the packaged teacher takes here for a picture of a bucket, which it sees at twice the size; the median of three."""
    pixels = np.random.default_rng(0).integers(0, 256, (TEACHER_BATCH, 2 * height, 2 * width, 3), np.uint8)
    teacher_features(pixels[:1])  # loads it
    times = []
    for _ in range(3):
        began = time.perf_counter()
        teacher_features(pixels)
        times.append(time.perf_counter() - began)
    return statistics.median(times) / TEACHER_BATCH


def teacher_seconds(
    chain: Sequence[StageSpec], buckets: Mapping[str, int], cost: Callable[[int, int], float] = seconds_a_picture
) -> float:
    """What the cached features that a chain of stages reads take to make, once a picture; `buckets` are encode's counts."""
    sides = {side for spec in chain for side in aligned(FlowMatchingConfig.model_validate(spec.config))}
    read = {name: count for name, count in buckets.items() if parse_bucket(name)[0] in sides}
    return sum(count * cost(*parse_bucket(name)[1]) for name, count in read.items())


def aligned(config: FlowMatchingConfig) -> set[int]:
    """The resolutions at which a stage reads cached teacher features."""
    if config.repa is None or not config.repa.needs_cached_features:
        return set()
    return {side for phase in phases_of(config) if phase.repa for side in phase.select.resolutions}


def _run(config: LifecycleConfig, specs: list[StageSpec], switch: str, display: Display) -> Run:
    """The stages brought to their artifacts; a run of its own in the record."""
    about = {"name": f"ablate-{switch}", "config": config.model_dump(mode="json")}
    run = Run(f"ablate-{switch}-{uuid.uuid4().hex[:8]}", specs, config.run, about, display=display)
    run.execute()
    return run


def _seconds(run: Run, spec: StageSpec) -> float:
    """What a stage took when it was made."""
    return float(run.artifacts[spec.name].facts["seconds"])

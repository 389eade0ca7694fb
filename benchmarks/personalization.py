"""DreamBooth-LoRA on the demo model: new subjects, what the rest lost, and two adapters in one model.

Measured on the checkpoint of one finished demo (`T2I_DEMO_RECORD`, the record of a run; without it the demo is run) with the
settings of presets/subjects.yaml: two subjects from 5 pictures each with two seeds, with and without prior
preservation, and their mixes. Seconds are those of one CPU core (process time), beside the clock's; `unit` is the same for 100
plain training steps of 16, before and after.
bars: robot's accuracy at least .6; every seed closes at least .6 of the gap base -> real in subject similarity in at most
90 s; class drift at most .1 and more without prior; adapter at most 3 % of the model's bytes; the distilled mix keeps at least .85
of each subject.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.lifecycle_runs import PRESET, lifecycle, mean
from benchmarks.record import record
from infra.artifacts import Artifact
from infra.config import load_yaml
from infra.stages import Resources, StageContext, fan_out_here, no_progress
from models.engine.distribute import one_thread
from models.evaluation.judge import Judge
from models.personalization.config import DreamBoothConfig, MixConfig
from models.sampling.generate import load_generator
from tasks.config import EvaluateConfig, SubjectConfig
from tasks.distill_mix import distill_mix
from tasks.evaluate_prompts import prompt_set, subject_prompts
from tasks.evaluate_subjects import measure
from tasks.mix import mix
from tasks.personalize import dreambooth

log = logging.getLogger(__name__)
PARENT = "dpo"
ACCURACY, DRIFT, SECONDS, GAP, BYTES, KEPT = 0.6, 0.1, 90, 0.6, 0.03, 0.85
PROMPTS, SEEDS, UNIT_STEPS = 120, (0, 1), 100
SETTINGS = load_yaml(PRESET.with_name("subjects.yaml"))
LEARNT = {stage["subject"]: DreamBoothConfig.model_validate(stage) for stage in SETTINGS["personalize"]}
MIX = MixConfig.model_validate(SETTINGS["mix"][0])


@dataclass(frozen=True)
class Places:
    """Folders of a finished lifecycle, and where to write."""

    init: Path
    data: Path
    judge: Path
    out: Path


@dataclass(frozen=True)
class Known:
    """What a checkpoint knows of one subject."""

    right: np.ndarray  # bool [N]
    similarity: float


def context(places: Places, name: str, **inputs: Path) -> StageContext:
    """The context of a stage called in this process; the base's digest is its folder's name."""
    for folder in (places.out / name, places.out / f"{name}-scratch"):
        folder.mkdir(parents=True)
    parents = {role: Artifact(kind="checkpoint", uri=path.as_uri(), digest=path.name, stage=role, parents=())
               for role, path in inputs.items()}  # fmt: skip
    scratch = places.out / f"{name}-scratch"
    return StageContext(name, inputs, parents, places.out / name, scratch, Resources(), no_progress, fan_out_here)


def learn(places: Places, subject: str, seed: int = 0, **changes: Any) -> tuple[Path, dict[str, float]]:
    """The checkpoint that learnt a subject as the preset says but for `changes`, and what it took."""
    config = LEARNT[subject].model_copy(update=changes)
    config = config.model_copy(update={"train": config.train.model_copy(update={"seed": seed})})
    name = "-".join([config.name, str(seed), *changes])
    ctx, started = context(places, name, init=places.init, data=places.data), clocks()
    dreambooth(config, ctx)
    return ctx.out, since(started)


def together(places: Places, method: str, adapters: dict[str, Path], seed: int) -> tuple[Path, dict[str, float]]:
    """The preset's mix, or another method with its defaults, and what it took."""
    config = MIX if method == MIX.method else MixConfig(adapters=MIX.adapters, method=method)
    config = config.model_copy(update={"seed": seed})
    inputs = {"init": places.init, "data": places.data, **{LEARNT[name].name: out for name, out in adapters.items()}}
    ctx, started = context(places, f"mix-{method}-{seed}", **inputs), clocks()
    (distill_mix if method == "distilled" else mix)(config, ctx)
    return ctx.out, since(started)


def clocks() -> tuple[float, float]:
    """CPU time of this process, and the clock."""
    return time.process_time(), time.perf_counter()


def since(started: tuple[float, float]) -> dict[str, float]:
    """Seconds of CPU and of the clock."""
    return {name: now - then for name, now, then in zip(("cpu", "wall"), clocks(), started, strict=True)}


def unit(places: Places) -> float:
    """CPU seconds of 100 forward and backward passes of the model on 16 pictures with prompts of 16 tokens."""
    denoiser = load_generator(places.init).denoiser
    x, t, mask = torch.randn(16, 3, 32, 32), torch.rand(16), torch.ones(16, 16).bool()
    tokens, started = torch.randn(16, 16, denoiser.transformer.config.context_in_dim), clocks()
    for _ in range(UNIT_STEPS):
        denoiser(x, t, tokens, mask)[0].square().mean().backward()
    return since(started)["cpu"]


def known(judge: Judge, checkpoint: Path, subject: str) -> Known:
    """Pictures of a subject under the judge."""
    asked = SubjectConfig(scene_object=subject, phrase=f"{LEARNT[subject].token} {subject}", prompts=PROMPTS)
    prompts = subject_prompts(asked, EvaluateConfig().seed)
    images = load_generator(checkpoint).sample(prompts.texts, prompts.seeds)
    right, similarity = measure(judge, prompts, images, EvaluateConfig())
    return Known(right, float(similarity.mean()))


def ceiling(judge: Judge, subject: str) -> float:
    """Similarity of two real renders of the same scenes."""
    from data_curation.scenes import draw_batch

    prompts = subject_prompts(SubjectConfig(scene_object=subject, prompts=PROMPTS), EvaluateConfig().seed)
    images = draw_batch(prompts.scenes, 32, seed=99)
    return float(measure(judge, prompts, images, EvaluateConfig())[1].mean())


def ordinary(judge: Judge, checkpoint: Path) -> float:
    """Strict accuracy on held-out prompts of the basic vocabulary."""
    prompts = prompt_set("held_out_basic", 320, EvaluateConfig().seed)
    images = load_generator(checkpoint).sample(prompts.texts, prompts.seeds)
    return float(judge.score(images, prompts.scenes)["all"].mean())


def share_of_bytes(checkpoint: Path) -> float:
    """Adapter file over model file."""
    model = (checkpoint / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size
    return (checkpoint / "adapter" / "adapter_model.safetensors").stat().st_size / model


def gap_closed(base: Known, tuned: Known, real: float) -> float:
    """How far from the base to real pictures the subject similarity came."""
    return (tuned.similarity - base.similarity) / (real - base.similarity)


def experiments(places: Places) -> dict[str, Any]:
    """Two subjects with every seed, the ablation of the prior, and the mixes."""
    judge = Judge.load(places.judge)
    before, units = ordinary(judge, places.init), [unit(places)]
    base = {subject: known(judge, places.init, subject) for subject in LEARNT}
    real = {subject: ceiling(judge, subject) for subject in LEARNT}
    learnt: dict[int, dict[str, Path]] = {}
    alone: dict[int, dict[str, dict[str, Any]]] = {}
    for seed in SEEDS:
        learnt[seed], alone[seed] = {}, {}
        for subject in LEARNT:
            learnt[seed][subject], seconds = learn(places, subject, seed)
            tuned = known(judge, learnt[seed][subject], subject)
            alone[seed][subject] = {
                "accuracy": float(tuned.right.mean()), "seconds": seconds, "similarity": tuned.similarity,
                "gap_closed": gap_closed(base[subject], tuned, real[subject]),
                "bytes": share_of_bytes(learnt[seed][subject]),
                "class_drift": 1 - ordinary(judge, learnt[seed][subject]) / before,
            }  # fmt: skip
            log.info("%s seed %d: %s", subject, seed, alone[seed][subject])
    without, _ = learn(places, "robot", prior_weight=0.0)
    mixes = []
    for method, seeds in (("sum", SEEDS[:1]), ("fused", SEEDS[:1]), ("distilled", SEEDS)):
        for seed in seeds:
            out, seconds = together(places, method, learnt[seed], seed)
            right = {subject: float(known(judge, out, subject).right.mean()) for subject in LEARNT}
            kept = {subject: right[subject] / max(alone[seed][subject]["accuracy"], 1e-9) for subject in LEARNT}
            drift = 1 - ordinary(judge, out) / before
            mixes.append({"method": method, "seed": seed, "accuracy": right, "kept": kept, "seconds": seconds,
                          "class_drift": drift, "bytes": share_of_bytes(out) if (out / "adapter").exists() else None})  # fmt: skip
            log.info("mix %s", mixes[-1])
    units.append(unit(places))
    return {
        "ordinary_before": before, "unit_seconds": units, "learnt": alone, "mixes": mixes,
        "base": {subject: {"accuracy": float(each.right.mean()), "similarity": each.similarity, "real": real[subject]}
                 for subject, each in base.items()},
        "without_prior": {"accuracy": float(known(judge, without, "robot").right.mean()),
                          "class_drift": 1 - ordinary(judge, without) / before},
    }  # fmt: skip


def figure(name: str, value: float, bar: float, met: bool) -> dict[str, Any]:
    """One figure of the record."""
    return {"name": name, "value": round(value, 4), "bar": bar, "met": met}


def figures_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The bars, each on its worst seed but for the accuracies and what mixes keep, which are means."""
    learnt, figures = found["learnt"], []
    for subject in LEARNT:
        each = [learnt[seed][subject] for seed in SEEDS]
        kept = mean([m["kept"][subject] for m in found["mixes"] if m["method"] == "distilled"])
        gap, longest = min(e["gap_closed"] for e in each), max(e["seconds"]["cpu"] for e in each)
        weight, drift = max(e["bytes"] for e in each), max(e["class_drift"] for e in each)
        figures += [
            figure(f"{subject}_gap_closed", gap, GAP, gap >= GAP),
            figure(f"{subject}_seconds", longest, SECONDS, longest <= SECONDS),
            figure(f"{subject}_bytes", weight, BYTES, weight <= BYTES),
            figure(f"{subject}_class_drift", drift, DRIFT, drift <= DRIFT),
            figure(f"{subject}_kept_by_distilled_mix", kept, KEPT, kept >= KEPT),
        ]
    drift, without = learnt[SEEDS[0]]["robot"]["class_drift"], found["without_prior"]["class_drift"]
    return [*figures, figure("class_drift_without_prior", without, drift, without > 2 * max(drift, 0))]


def main() -> dict[str, Any]:
    """Measure on a finished demo."""
    given = os.environ.get("T2I_DEMO_RECORD")
    run = json.loads(Path(given).read_text()) if given else lifecycle(0)
    entries = {entry["name"]: Path(entry["uri"].removeprefix("file://")) for entry in run["stages"]}
    with tempfile.TemporaryDirectory() as folder, one_thread():
        found = experiments(Places(entries[PARENT], entries["encode"], entries["judge"], Path(folder)))
    figures, accuracy = figures_of(found), mean([found["learnt"][seed]["robot"]["accuracy"] for seed in SEEDS])
    met = accuracy >= ACCURACY and all(each["met"] for each in figures)
    return record("personalization", list(SEEDS), accuracy, ACCURACY, ACCURACY, met,
                  {"figures": figures, "experiments": found})  # fmt: skip


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    print(json.dumps(main()))

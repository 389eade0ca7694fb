"""DreamBooth-LoRA on the demo model: new subjects, what the rest lost, and two adapters in one model.

Read from three lifecycles: the demo's robot. Measured here on the first one's checkpoint, with the demo's settings: the
robot and the octopus from 5 pictures each, with and without prior preservation, and their mix.
bars: subject accuracy at least .6 (mean of three seeds), class drift at most .1 and more without prior; from 5 pictures
at least .6 of the gap base -> real in subject similarity in at most 90 s; adapter at most 3 % of the model's bytes; the
mix keeps at least .85 of each subject.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.lifecycle_runs import PRESET, SEEDS, lifecycle, made_in, mean, score
from benchmarks.record import record
from infra.artifacts import Artifact
from infra.stages import Resources, StageContext, fan_out_here, no_progress
from models.evaluation.judge import Judge
from models.personalization.config import DreamBoothConfig, MixConfig
from models.sampling.generate import load_generator
from tasks.config import EvaluateConfig, SubjectConfig
from tasks.evaluate_prompts import prompt_set, subject_prompts
from tasks.evaluate_subjects import measure
from tasks.mix import mix
from tasks.personalize import dreambooth

STAGE, PARENT = "dreambooth-robot", "dpo"
ACCURACY, DRIFT, SECONDS, GAP, BYTES, KEPT = 0.6, 0.1, 90, 0.6, 0.03, 0.85
PICTURES, PROMPTS = 5, 120
TOKENS = {"robot": "eels", "octopus": "vox"}


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


def learn(places: Places, name: str, subject: str, **changes: Any) -> tuple[Path, float]:
    """The checkpoint that learnt a demo subject with the demo's settings, and the seconds that took."""
    settings = yaml.safe_load(PRESET.read_text())["personalize"][0]
    own = {"name": name, "subject": subject, "class_word": subject, "token": TOKENS[subject], "pictures": PICTURES}
    config = DreamBoothConfig.model_validate(settings | own | changes)
    ctx, started = context(places, name, init=places.init, data=places.data), time.perf_counter()
    dreambooth(config, ctx)
    return ctx.out, time.perf_counter() - started


def known(judge: Judge, checkpoint: Path, subject: str) -> Known:
    """Pictures of a subject under the judge."""
    asked = SubjectConfig(scene_object=subject, phrase=f"{TOKENS[subject]} {subject}", prompts=PROMPTS)
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
    """Two subjects from 5 pictures, the ablation of the prior, and the mix."""
    judge, before = Judge.load(places.judge), ordinary(Judge.load(places.judge), places.init)
    found: dict[str, Any] = {"ordinary_before": before}
    outs = {}
    for subject in TOKENS:
        outs[subject], seconds = learn(places, f"dreambooth-{subject}", subject)
        base, tuned, real = (
            known(judge, places.init, subject),
            known(judge, outs[subject], subject),
            ceiling(judge, subject),
        )
        found[subject] = {
            "accuracy": float(tuned.right.mean()), "base_accuracy": float(base.right.mean()), "seconds": seconds,
            "similarity": {"base": base.similarity, "tuned": tuned.similarity, "real": real},
            "gap_closed": gap_closed(base, tuned, real), "bytes": share_of_bytes(outs[subject]),
            "class_drift": 1 - ordinary(judge, outs[subject]) / before,
        }  # fmt: skip
    without, _ = learn(places, "dreambooth-no-prior", "robot", prior_weight=0.0)
    found["without_prior"] = {
        "accuracy": float(known(judge, without, "robot").right.mean()),
        "class_drift": 1 - ordinary(judge, without) / before,
    }
    inputs = {"init": places.init, **{f"dreambooth-{subject}": out for subject, out in outs.items()}}
    ctx = context(places, "mix", **inputs)
    facts = mix(MixConfig(adapters=dict.fromkeys((name for name in inputs if name != "init"), 1.0)), ctx)
    found["mix"] = {"interference": facts["interference"], "class_drift": 1 - ordinary(judge, ctx.out) / before}
    for subject in TOKENS:
        both = known(judge, ctx.out, subject)
        found["mix"][subject] = {
            "accuracy": float(both.right.mean()),
            "kept": float(both.right.mean()) / max(found[subject]["accuracy"], 1e-9),
        }
    return found


def figure(name: str, value: float, bar: float, met: bool) -> dict[str, Any]:
    """One figure of the record."""
    return {"name": name, "value": round(value, 4), "bar": bar, "met": met}


def figures_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The bars that are measured here."""
    robot, without = found["robot"]["class_drift"], found["without_prior"]["class_drift"]
    figures = [figure("class_drift_without_prior", without, robot, without > robot)]
    for subject in TOKENS:
        own, mixed = found[subject], found["mix"][subject]["kept"]
        figures += [
            figure(f"{subject}_gap_closed", own["gap_closed"], GAP, own["gap_closed"] >= GAP),
            figure(f"{subject}_seconds", own["seconds"], SECONDS, own["seconds"] <= SECONDS),
            figure(f"{subject}_bytes", own["bytes"], BYTES, own["bytes"] <= BYTES),
            figure(f"{subject}_class_drift", own["class_drift"], DRIFT, own["class_drift"] <= DRIFT),
            figure(f"{subject}_kept_by_mix", mixed, KEPT, mixed >= KEPT),
        ]
    return figures


def main() -> dict[str, Any]:
    """Read three lifecycles, then measure on the first."""
    runs = [lifecycle(seed) for seed in SEEDS]
    subject = [score(run, STAGE, "subject_accuracy") for run in runs]
    before = [score(run, PARENT, "subject_accuracy") for run in runs]
    drift = [score(run, STAGE, "class_drift") for run in runs]
    seconds = [made_in(run, STAGE) for run in runs]
    entries = {entry["name"]: Path(entry["uri"].removeprefix("file://")) for entry in runs[0]["stages"]}
    with tempfile.TemporaryDirectory() as folder:
        found = experiments(Places(entries[PARENT], entries["encode"], entries["judge"], Path(folder)))
    figures = figures_of(found)
    met = mean(subject) >= ACCURACY and max(drift) <= DRIFT and max(seconds) <= SECONDS
    detail = {"subject_accuracy": subject, "before": before, "class_drift": drift, "seconds": seconds,
              "figures": figures, "experiments": found}  # fmt: skip
    met = met and all(each["met"] for each in figures)
    return record("personalization", list(SEEDS), mean(subject), ACCURACY, ACCURACY, met, detail)


if __name__ == "__main__":
    print(json.dumps(main()))

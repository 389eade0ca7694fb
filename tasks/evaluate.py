"""Stage `evaluate`: every checkpoint draws the same prompts with the same noise; judge, distances and gates say how well."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data_curation.scenes import draw_batch
from infra.errors import ConfigError, GateFailed
from infra.stages import StageContext
from models.evaluation.collapse import collapsed
from models.evaluation.distances import kernel_distance
from models.evaluation.diversity import diversity
from models.evaluation.gates import Verdict, judge_gate
from models.evaluation.intervals import Score, bootstrap, score, wilson
from models.evaluation.judge import Judge
from models.sampling.generate import load_generator
from tasks.config import EvaluateConfig, PromptSetConfig, SubjectConfig
from tasks.evaluate_prompts import Prompts, grid_prompts, prompt_set, several_seeds, subject_prompts

NOT_CHECKPOINTS = ("judge", "data", "truth", "source")
SUFFIX = {"held_out_basic": "", "held_out_full": "_full", "training": "_training", "long": "_long"}
HEADS = {"layout": "layout_accuracy", "object": "object_accuracy", "background": "colour_accuracy",
         "shape": "shape_accuracy"}  # fmt: skip
ALWAYS = ("grid", "diversity")


@dataclass(frozen=True)
class Job:
    """One checkpoint asked one list of prompts."""

    stage: str
    label: str
    folder: Path
    prompts: Prompts
    side: int
    batch_size: int


@dataclass
class Sheet:
    """What is known of one checkpoint: scores by metric, and the paired answers behind them."""

    scores: dict[str, Score] = field(default_factory=dict)
    answers: dict[str, np.ndarray] = field(default_factory=dict)
    by_layout: dict[str, Score] = field(default_factory=dict)
    collapse: dict[str, float] = field(default_factory=dict)
    p_value: float | None = None


def draw_job(job: Job) -> np.ndarray:
    """Pictures uint8 [N, side, side, 3]; one thread, so that they do not depend on the machine's cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        generator = load_generator(job.folder)
        return generator.sample(
            job.prompts.texts, job.prompts.seeds, width=job.side, height=job.side, batch_size=job.batch_size
        )
    finally:
        torch.set_num_threads(threads)


def set_label(chosen: PromptSetConfig) -> str:
    """Name of a prompt list in the files; also the suffix logic of its metrics."""
    return chosen.name if chosen.side == 32 else f"{chosen.name}_{chosen.side}px"


def plan_jobs(config: EvaluateConfig, checkpoints: dict[str, Path]) -> list[Job]:
    """Every (checkpoint, list) pair; refuses names of stages that are not inputs."""
    wanted = {stage for chosen in config.sets for stage in chosen.stages or ()}
    wanted |= {name for subject in config.subjects for name in (subject.stage, subject.parent)}
    if unknown := sorted(wanted - set(checkpoints)):
        raise ConfigError(
            f"evaluate names stages {unknown} that are not its inputs {sorted(checkpoints)}; fix the names"
        )
    lists: list[tuple[str, Prompts, int, tuple[str, ...] | None]] = [
        (set_label(c), prompt_set(c.name, c.prompts, config.seed), c.side, c.stages) for c in config.sets
    ]
    lists.append(("grid", grid_prompts(config.grid_prompts, config.seed, config.subjects), 32, None))
    if config.diversity_prompts:
        several = several_seeds(config.diversity_prompts, config.diversity_seeds, config.seed)
        lists.append(("diversity", several, 32, None))
    for subject in config.subjects:
        asked = subject_prompts(subject, config.seed)
        lists.append((f"subject-{subject.stage}", asked, 32, (subject.stage, subject.parent)))
    return [
        Job(stage, label, folder, prompts, side, config.batch_size)
        for stage, folder in checkpoints.items()
        for label, prompts, side, stages in lists
        if stages is None or stage in stages
    ]


def score_set(sheet: Sheet, judge: Judge, chosen: PromptSetConfig, prompts: Prompts, images: np.ndarray) -> None:
    """Strict and per-head accuracies of one prompt list into the sheet."""
    suffix = SUFFIX[chosen.name] + ("" if chosen.side == 32 else f"_{chosen.side}px")
    verdict = judge.score(images, prompts.scenes)
    named = {f"prompt_accuracy{suffix}": verdict["all"]}
    named |= {f"{metric}{suffix}": verdict[head] for head, metric in HEADS.items()}
    for metric, right in named.items():
        sheet.answers[metric] = right
        sheet.scores[metric] = wilson(right)
    if suffix in ("", "_full"):
        layouts = np.array([scene.layout for scene in prompts.scenes])
        sheet.by_layout |= {str(name): wilson(verdict["all"][layouts == name]) for name in np.unique(layouts)}


def score_subject(
    sheet: Sheet, judge: Judge, prompts: Prompts, images: np.ndarray, config: EvaluateConfig, seed: int
) -> None:
    """Is the subject in the picture (judge), and how close are its features to real pictures of the same scene."""
    right = judge.score(images, prompts.scenes)["all"]
    sheet.answers["subject_accuracy"], sheet.scores["subject_accuracy"] = right, wilson(right)
    own, real = judge.features(images), judge.features(draw_batch(prompts.scenes, 32, seed))
    centre = real.mean(0)
    own, real = own - centre, real - centre
    cosine = (own * real).sum(1) / (np.linalg.norm(own, axis=1) * np.linalg.norm(real, axis=1) + 1e-9)
    rng = np.random.default_rng([seed, 3])
    sheet.answers["subject_similarity"] = cosine
    sheet.scores["subject_similarity"] = bootstrap((cosine,), lambda x: float(x.mean()), config.bootstrap, rng)


def class_drift(child: np.ndarray, parent: np.ndarray, resamples: int) -> Score:
    """Share of the parent's right answers that personalisation lost, paired; negative is a gain."""

    def lost(own: np.ndarray, before: np.ndarray) -> float:
        return float(1 - own.mean() / before.mean()) if before.any() else 0.0

    return bootstrap((child, parent), lost, resamples, np.random.default_rng(4))


def distances(
    sheet: Sheet, judge: Judge, images: np.ndarray, reals: Sequence[np.ndarray], config: EvaluateConfig
) -> None:
    """Kernel distance to real renders of the same scenes, and the distance of two sets of such renders as its floor."""
    reference, other = (judge.features(real) for real in reals)
    rng = np.random.default_rng([config.seed, 6])
    found = kernel_distance(judge.features(images), reference, config.bootstrap, rng)
    floor = kernel_distance(other, reference, config.bootstrap, np.random.default_rng([config.seed, 7]))
    sheet.scores["kernel_distance"], sheet.p_value = found.score, found.p_value
    sheet.scores["kernel_distance_floor"] = floor.score


def diversity_score(judge: Judge, images: np.ndarray, config: EvaluateConfig) -> Score:
    """Within-prompt diversity of pictures ordered prompt by prompt."""
    features = judge.features(images).reshape(config.diversity_prompts, config.diversity_seeds, -1)
    return diversity(features, config.bootstrap, np.random.default_rng([config.seed, 8]))

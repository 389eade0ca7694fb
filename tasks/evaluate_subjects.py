"""What personalised checkpoints and their mixes know of the subjects, and what they lost of the rest.

A mix is asked for each subject as the checkpoint is that learnt it alone, with the same noise. `subject_kept` is the
share of its right answers that the mix still gives; `subject_bleed` is how often a subject is in pictures asked for
another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from data_curation.scenes import draw_batch
from models.evaluation.intervals import Score, bootstrap, wilson
from models.evaluation.judge import SIDE, Judge
from tasks.config import EvaluateConfig, SubjectConfig
from tasks.evaluate_prompts import Prompts
from tasks.evaluate_scores import Sheet, mean_score


def subject_label(subject: SubjectConfig) -> str:
    """Name of a subject's prompt list."""
    return f"subject-{subject.stage}"


def score_subjects(
    sheet: Sheet, judge: Judge, prompts: Mapping[str, Prompts], drawn: Mapping[str, np.ndarray], config: EvaluateConfig
) -> None:
    """Each subject by its own name; over all subjects that were asked, the metrics without one."""
    asked = [subject for subject in config.subjects if subject_label(subject) in drawn]
    for subject in asked:
        label, name = subject_label(subject), subject.scene_object
        right, similarity = measure(judge, prompts[label], drawn[label], config)
        sheet.answers |= {f"subject_accuracy_{name}": right, f"subject_similarity_{name}": similarity}
        others = [other for other in asked if other.scene_object != name]
        if others:
            there = np.concatenate([shown_in(judge, name, prompts, drawn, subject_label(other)) for other in others])
            sheet.scores[f"subject_bleed_{name}"] = wilson(there)
    if not asked:
        return
    for metric, score_of in (("subject_accuracy", wilson), ("subject_similarity", lambda v: mean_score(v, config, 3))):
        each = {f"{metric}_{s.scene_object}": sheet.answers[f"{metric}_{s.scene_object}"] for s in asked}
        sheet.answers[metric] = np.concatenate(list(each.values()))
        sheet.scores |= {name: score_of(values) for name, values in {metric: sheet.answers[metric], **each}.items()}


def measure(
    judge: Judge, prompts: Prompts, images: np.ndarray, config: EvaluateConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Is the subject in each picture, and how close are its features to those of a real picture of the same scene."""
    right = judge.score(images, prompts.scenes)["all"]
    own, real = judge.features(images), judge.features(draw_batch(prompts.scenes, SIDE, config.seed + 2))
    cosine = (own * real).sum(1) / (np.linalg.norm(own, axis=1) * np.linalg.norm(real, axis=1) + 1e-9)
    return right, cosine


def shown_in(
    judge: Judge, name: str, prompts: Mapping[str, Prompts], drawn: Mapping[str, np.ndarray], label: str
) -> np.ndarray:
    """In which of a list's pictures the judge sees that object."""
    scenes = [replace(scene, objects=(name,)) for scene in prompts[label].scenes]
    return judge.score(drawn[label], scenes)["object"]


def compare_subjects(sheets: Mapping[str, Sheet], config: EvaluateConfig, ordinary: str) -> None:
    """Class drift of every checkpoint against its parent, and what mixes kept of each subject."""
    for subject in config.subjects:
        before = sheets[subject.parent].answers.get(ordinary)
        for stage in (subject.stage, *subject.mixed):
            own = sheets[stage].answers.get(ordinary)
            if own is not None and before is not None:
                sheets[stage].scores["class_drift"] = class_drift(own, before, config.bootstrap)
        alone = sheets[subject.stage].answers[f"subject_accuracy_{subject.scene_object}"]
        for stage in subject.mixed:
            mixed, scores = sheets[stage].answers[f"subject_accuracy_{subject.scene_object}"], sheets[stage].scores
            scores[f"subject_kept_{subject.scene_object}"] = kept(mixed, alone, config.bootstrap)
            each = [score for name, score in scores.items() if name.startswith("subject_kept_")]
            scores["subject_kept"] = min(each, key=lambda score: score["value"])


def class_drift(child: np.ndarray, parent: np.ndarray, resamples: int) -> Score:
    """Share of the parent's right answers to ordinary prompts that personalisation lost, paired; < 0 is a gain."""
    return bootstrap((child, parent), lambda own, before: 1 - ratio(own, before), resamples, np.random.default_rng(4))


def kept(mixed: np.ndarray, alone: np.ndarray, resamples: int) -> Score:
    """Right answers of the mix per right answer of the checkpoint that knows one subject, paired."""
    return bootstrap((mixed, alone), ratio, resamples, np.random.default_rng(5))


def ratio(own: np.ndarray, other: np.ndarray) -> float:
    """Ratio of means; 1 where there was nothing to lose."""
    return float(own.mean() / other.mean()) if other.any() else 1.0

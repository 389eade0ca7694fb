"""What a checkpoint's pictures are worth: accuracies, distances, diversity, subject scores, collapse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_curation.scenes import draw_batch
from models.evaluation.collapse import collapsed
from models.evaluation.density_coverage import density_coverage
from models.evaluation.distances import kernel_distance
from models.evaluation.diversity import diversity
from models.evaluation.geneval import Prompt
from models.evaluation.intervals import Score, bootstrap, mean_of_groups, share_by_prompt, wilson
from models.evaluation.judge import SIDE, Judge
from models.evaluation.precision_recall import precision_recall
from models.evaluation.prompt_categories import Asked, by_category
from models.evaluation.vendi import vendi_score
from models.posttraining.reward import judge_reward
from tasks.config import EvaluateConfig, PromptSetConfig
from tasks.evaluate_detector import GENEVAL, eyes, faults_of, hub_rewards
from tasks.evaluate_prompts import Prompts, reference_scenes

SUFFIX = {"held_out_basic": "", "held_out_full": "_full", "training": "_training", "long": "_long"}
NEIGHBOURS = 5  # of density and coverage
HEADS = {
    "layout": "layout_accuracy",
    "object": "object_accuracy",
    "background": "colour_accuracy",
    "shape": "shape_accuracy",
}


@dataclass
class Sheet:
    """What is known of one checkpoint: scores by metric, and the paired answers behind them."""

    scores: dict[str, Score] = field(default_factory=dict)
    answers: dict[str, np.ndarray] = field(default_factory=dict)
    by_layout: dict[str, dict[str, Score]] = field(default_factory=dict)
    by_category: dict[str, dict[str, Score]] = field(default_factory=dict)
    manifold: dict[str, float] = field(default_factory=dict)
    collapse: dict[str, float] = field(default_factory=dict)
    p_value: float | None = None
    geneval: list[dict[str, Any]] = field(default_factory=list)  # one row a picture: prompt, tag, seed, what is wrong

    def detail(self) -> dict[str, Any]:
        """What stands beside the scores in scores.json."""
        return {
            "by_layout": self.by_layout, "by_category": self.by_category, "manifold": self.manifold,
            "collapse": self.collapse, "kernel_distance_p_value": self.p_value,
        }  # fmt: skip


def label_of(chosen: PromptSetConfig) -> str:
    """Name of a prompt list in files."""
    return chosen.name if chosen.side == SIDE else f"{chosen.name}_{chosen.side}px"


def suffix_of(chosen: PromptSetConfig) -> str:
    """What a prompt list adds to its metrics' names."""
    return SUFFIX[chosen.name] + ("" if chosen.side == SIDE else f"_{chosen.side}px")


def mean_score(values: np.ndarray, config: EvaluateConfig, stream: int) -> Score:
    """Mean of one number per picture with a bootstrap interval."""
    rng = np.random.default_rng([config.seed, stream])
    return bootstrap((values.astype(float),), lambda x: float(x.mean()), config.bootstrap, rng)


def score_set(
    sheet: Sheet, judge: Judge, chosen: PromptSetConfig, prompts: Prompts, images: np.ndarray, config: EvaluateConfig
) -> None:
    """Strict and per-head accuracies of one prompt list, and the reward that preference tuning raises."""
    suffix = suffix_of(chosen)
    verdict = judge.score(images, prompts.scenes)
    right = {f"prompt_accuracy{suffix}": verdict["all"]}
    right |= {f"{metric}{suffix}": verdict[head] for head, metric in HEADS.items()}
    reward = judge_reward(judge, images, prompts.scenes)
    sheet.answers |= right | {f"reward{suffix}": reward}
    sheet.scores |= {metric: wilson(values) for metric, values in right.items()}
    sheet.scores[f"reward{suffix}"] = mean_score(reward, config, 2)
    layouts = np.array([scene.layout for scene in prompts.scenes])
    sheet.by_layout[label_of(chosen)] = {
        str(name): wilson(verdict["all"][layouts == name]) for name in np.unique(layouts)
    }
    asked = [Asked.of(scene) for scene in prompts.scenes]
    sheet.by_category[label_of(chosen)] = {
        name: wilson(values)
        for name, values in by_category(asked, eyes(config, judge)(images)).items()
        if name != "all"
    }
    for metric, values in hub_rewards(config, images, prompts.texts).items():
        sheet.answers[f"{metric}{suffix}"] = values
        sheet.scores[f"{metric}{suffix}"] = mean_score(values, config, 3)
    sheet.collapse[label_of(chosen)] = round(float(collapsed(images)["any"].mean()), 5)


@dataclass(frozen=True)
class Reference:
    """Features of real renders of the first prompt list, and how far two such sets are apart."""

    features: np.ndarray
    floor: Score

    @classmethod
    def of(cls, judge: Judge, chosen: PromptSetConfig, prompts: Prompts, config: EvaluateConfig) -> Reference:
        """Renders of scenes drawn independently of the prompts; renders of the prompts' own scenes give the floor."""
        scenes = reference_scenes(chosen.name, 2 * len(prompts), config.seed)
        own = judge.features(draw_batch(scenes, chosen.side, config.seed + 100))
        perfect = judge.features(draw_batch(prompts.scenes, chosen.side, config.seed + 101))
        rng = np.random.default_rng([config.seed, 7])
        return cls(own, kernel_distance(perfect, own, config.bootstrap, rng, permutations=0).score)


def score_distance(
    sheet: Sheet, judge: Judge, images: np.ndarray, reference: Reference, config: EvaluateConfig
) -> None:
    """Kernel distance to real renders of the same scenes, with the floor beside it."""
    rng = np.random.default_rng([config.seed, 6])
    features = judge.features(images)
    found = kernel_distance(features, reference.features, config.bootstrap, rng)
    if len(features) > NEIGHBOURS:
        pairs = zip(("precision", "recall"), precision_recall(features, reference.features), strict=True)
        more = zip(("density", "coverage"), density_coverage(features, reference.features, NEIGHBOURS), strict=True)
        figures = dict(pairs) | dict(more) | {"vendi": vendi_score(features)}
        sheet.manifold = {name: round(value, 5) for name, value in figures.items()}
    sheet.scores |= {"kernel_distance": found.score, "kernel_distance_floor": reference.floor}
    sheet.p_value = round(found.p_value, 5)


def score_diversity(sheet: Sheet, judge: Judge, images: np.ndarray, config: EvaluateConfig) -> None:
    """Within-prompt diversity of pictures ordered prompt by prompt."""
    features = judge.features(images).reshape(config.diversity_prompts, config.diversity_seeds, -1)
    rng = np.random.default_rng([config.seed, 8])
    sheet.scores["diversity"] = diversity(features, config.bootstrap, rng)


def score_geneval(
    sheet: Sheet, prompts: Sequence[Prompt], seeds: Sequence[int], images: np.ndarray, config: EvaluateConfig
) -> None:
    """Shares of right pictures by tag and their mean over tags, as GenEval reports, and the rewards of these pictures."""
    rng, pictures = np.random.default_rng([config.seed, 9]), len(images) // len(prompts)
    faults = faults_of(config, prompts, images, pictures)
    right = np.array([not each for each in faults]).reshape(len(prompts), pictures)
    tags = np.array([prompt.tag for prompt in prompts])
    groups = {str(tag): right[tags == tag] for tag in dict.fromkeys(tags)}
    for tag, values in groups.items():
        sheet.scores[f"{GENEVAL}_{tag}"] = share_by_prompt(values, config.bootstrap, rng)
        sheet.answers[f"{GENEVAL}_{tag}"] = values.mean(1)
    sheet.scores[GENEVAL] = mean_of_groups([values.mean(1) for values in groups.values()], config.bootstrap, rng)
    size = {tag: len(values) * len(groups) / len(prompts) for tag, values in groups.items()}
    sheet.answers[GENEVAL] = right.mean(1) / np.array(
        [size[str(tag)] for tag in tags]
    )  # the mean is the mean over tags
    texts = [prompt.text for prompt in prompts for _ in range(pictures)]
    for metric, values in hub_rewards(config, images, texts).items():
        by_prompt = values.reshape(len(prompts), pictures).mean(1)
        sheet.answers[f"{metric}_{GENEVAL}"] = by_prompt
        sheet.scores[f"{metric}_{GENEVAL}"] = mean_score(by_prompt, config, 3)
    sheet.geneval = [
        {"prompt": text, "tag": prompts[i // pictures].tag, "seed": seeds[i], "wrong": faults[i]}
        for i, text in enumerate(texts)
    ]

"""What one row of the comparison is worth: accuracy, distances, diversity, sharpness, latency."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_curation.scenes import draw_batch
from models.evaluation.distances import kernel_distance
from models.evaluation.diversity import diversity
from models.evaluation.frequencies import high_frequency_energy
from models.evaluation.intervals import Score, wilson
from models.evaluation.judge import SIDE, Judge
from models.evaluation.precision_recall import precision_recall
from models.sampling.generate import load_generator, to_uint8
from tasks.config import CompareConfig
from tasks.evaluate_prompts import Prompts, reference_scenes


@dataclass(frozen=True)
class Yardstick:
    """Real renders: features of scenes drawn independently, their sharpness, and how far two real sets are apart."""

    features: np.ndarray
    sharpness: float
    floor: Score

    @classmethod
    def of(cls, judge: Judge, prompts: Prompts, config: CompareConfig) -> Yardstick:
        """Renders of independent scenes; renders of the prompts' own scenes give floor and sharpness."""
        scenes = reference_scenes("held_out_basic", 2 * len(prompts), config.seed)
        own = draw_batch(prompts.scenes, SIDE, config.seed + 101)
        features = judge.features(draw_batch(scenes, SIDE, config.seed + 100))
        rng = np.random.default_rng([config.seed, 7])
        floor = kernel_distance(judge.features(own), features, config.bootstrap, rng, permutations=0).score
        return cls(features, high_frequency_energy(own), floor)


@dataclass(frozen=True)
class Measured:
    """Scores by name; the answers behind the accuracy, for paired comparisons."""

    scores: dict[str, Any]
    right: np.ndarray

    @property
    def accuracy(self) -> float:
        """Share of right answers over both vocabularies."""
        return float(self.right.mean())

    @property
    def distance(self) -> float:
        """Kernel distance."""
        return float(self.scores["kernel_distance"]["value"])


def measure(
    judge: Judge, yardstick: Yardstick, lists: Mapping[str, Prompts], pictures: Mapping[str, np.ndarray],
    config: CompareConfig,
) -> Measured:  # fmt: skip
    """All scores of one row from its pictures of the three prompt lists."""
    basic = judge.score(pictures["basic"], lists["basic"].scenes)["all"]
    full = judge.score(pictures["full"], lists["full"].scenes)["all"]
    features = judge.features(pictures["basic"])
    rng = np.random.default_rng([config.seed, 6])
    found = kernel_distance(features, yardstick.features, config.bootstrap, rng)
    precision, recall = precision_recall(features, yardstick.features)
    several = judge.features(pictures["several"]).reshape(config.diversity_prompts, config.diversity_seeds, -1)
    scores = {
        "prompt_accuracy": wilson(basic), "prompt_accuracy_full": wilson(full), "kernel_distance": found.score,
        "kernel_distance_p_value": round(found.p_value, 5), "precision": round(precision, 4), "recall": round(recall, 4),
        "diversity": diversity(several, config.bootstrap, np.random.default_rng([config.seed, 8])),
        "high_frequency_ratio": round(high_frequency_energy(pictures["basic"]) / yardstick.sharpness, 4),
    }  # fmt: skip
    return Measured(scores, np.concatenate([basic, full]).astype(float))


def time_row(
    folder: Path, steps: int, guidance: float, prompts: Prompts, count: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Seconds of a batch of `count` pictures: p50 and p95 of encoding the texts, denoising, and making pixels."""
    generator = load_generator(folder)
    seconds: dict[str, list[float]] = {"encode": [], "denoise": [], "decode": []}
    generator.features([""])
    for i in range(rounds + 1):
        places = [(i * count + j) % len(prompts) for j in range(count)]
        texts, seeds = [prompts.texts[j] for j in places], [prompts.seeds[j] for j in places]
        generator.forget(texts)
        marks = [time.perf_counter()]
        generator.features(texts)
        marks.append(time.perf_counter())
        x = generator.draw(texts, seeds, width=SIDE, height=SIDE, steps=steps, guidance=guidance, batch_size=count)
        marks.append(time.perf_counter())
        to_uint8(torch.from_numpy(x))
        marks.append(time.perf_counter())
        if i:  # the first one warms up
            for name, spent in zip(seconds, np.diff(marks), strict=True):
                seconds[name].append(float(spent))
    return {
        name: {"p50": float(np.quantile(v, 0.5)), "p95": float(np.quantile(v, 0.95))} for name, v in seconds.items()
    }

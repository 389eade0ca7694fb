"""Stage `distribution`: pictures of every checkpoint against held-out pictures of the training set, on any embedding.

It knows no scenes and no judge, so it also measures foreign models on data of one's own. Checkpoints draw the captions of
one half of the held-out pictures and are compared with the other half; the half whose captions they drew gives the floor,
what real pictures get. Left out: captions that several pictures share are drawn once each.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_curation.aesthetic import aesthetic_score
from data_curation.dataset import Batch, Split, TrainingSet
from data_curation.embedders import Embedder, embedder
from infra.errors import DataRefused
from infra.stages import StageContext
from models.engine.distribute import one_thread
from models.evaluation.clip import clip_of
from models.evaluation.distribution import LEAST, distribution
from models.evaluation.intervals import Score, bootstrap
from models.evaluation.memorisation import memorisation
from models.networks.checkpoint import read_card
from models.posttraining.clip_reward import hub_scores
from models.sampling.generate import load_generator
from tasks.config import DistributionConfig

DATA, REAL = "data", "real"
SHOWN, CELL = 8, 96  # nearest pairs shown, px
ERROR = 0.01  # share of unseen real pictures that memorisation takes for copies


@dataclass(frozen=True)
class Pictures:
    """Pictures uint8 [H, W, 3] of the training set's buckets, and their captions."""

    images: list[np.ndarray]
    captions: list[str]

    def part(self, rows: np.ndarray) -> Pictures:
        """Some of them."""
        return Pictures([self.images[i] for i in rows], [self.captions[i] for i in rows])


@dataclass(frozen=True)
class Job:
    """One checkpoint draws the captions."""

    folder: Path
    prompts: list[str]
    seed: int


def draw(job: Job) -> np.ndarray:
    """uint8 [N, H, W, 3] by the checkpoint's own settings; on one thread, so that cores change nothing."""
    with one_thread():
        seeds = [job.seed + number for number in range(len(job.prompts))]
        return load_generator(job.folder).sample(job.prompts, seeds)


def held(data: TrainingSet, resolution: int, split: Split, caption: str, most: int, seed: int) -> Pictures:
    """At most so many pictures of a split, chosen by the seed."""
    chosen = data.select([resolution], split=split)
    rows = np.concatenate([rows for _, rows in sorted(chosen.buckets.items())])
    picked = set(np.random.default_rng([seed, 71]).permutation(rows)[:most].tolist())
    images, captions = list[np.ndarray](), list[str]()
    for bucket, inside in sorted(chosen.buckets.items()):
        wanted = np.array([row for row in inside if row in picked], np.int64)
        if len(wanted):
            found = data.gather(Batch(bucket, chosen.positions[wanted], wanted))
            images += list(found.images)
            captions += [data.captions[i] for i in (found.short if caption == "short" else found.long)]
    return Pictures(images, captions)


def embedded(embed: Embedder, images: Iterable[np.ndarray]) -> np.ndarray:
    """Features [N, D] of length 1."""
    return embed([Image.fromarray(image) for image in images])


def resolution_of(data: TrainingSet, checkpoints: Iterable[Path]) -> int:
    """That in which the last checkpoint draws, if there are pictures of it; else the largest."""
    held_out, sides = set(data.index["resolution"].to_pylist()), [read_card(folder).side for folder in checkpoints]
    return next((side for side in reversed(sides) if side in held_out), max(held_out))


@dataclass(frozen=True)
class Measured:
    """What all checkpoints are measured against: features of the real halves and of training pictures."""

    config: DistributionConfig
    embed: Embedder
    asked: Pictures
    real: np.ndarray
    unseen: np.ndarray
    training: np.ndarray

    def scores(
        self, images: Sequence[np.ndarray] | np.ndarray, features: np.ndarray, trained_on: bool = True
    ) -> tuple[dict[str, Score], np.ndarray | None]:
        """Every measure of pictures of the asked captions and of their features; and the nearest training picture of each."""
        rng = np.random.default_rng([self.config.seed, 72])
        found = distribution(features, self.real, self.config.bootstrap, rng)
        words = self.embed.texts(self.asked.captions)
        if words is not None:
            found["image_text"] = self._mean((features * words).sum(1), rng)
        if self.config.aesthetic is not None:
            found["aesthetic"] = self._mean(aesthetic_score(features, self.config.aesthetic), rng)
        for reward in self.config.rewards:
            found[f"hub_{reward.label}"] = self._mean(hub_scores(reward, images, self.asked.captions), rng)
        if not trained_on or len(self.unseen) * ERROR < 1:
            return found, None
        copies = memorisation(features, self.training, self.unseen, ERROR)
        return found | {"copied": copies.copied}, np.stack([copies.nearest.rows, copies.nearest.distances])

    def _mean(self, values: np.ndarray, rng: np.random.Generator) -> Score:
        return bootstrap((values.astype(float),), lambda x: float(x.mean()), self.config.bootstrap, rng)


def measure_distribution(config: DistributionConfig, ctx: StageContext) -> dict[str, Any]:
    """distribution.json: every checkpoint's scores, the floor and the embedding; nearest-STAGE.png: pictures beside the training's."""
    data = TrainingSet.open(ctx.inputs[DATA])
    checkpoints = {role: folder for role, folder in ctx.inputs.items() if role != DATA}
    resolution = config.resolution or resolution_of(data, checkpoints.values())
    every = held(data, resolution, "validation", config.caption, 2 * config.pictures, config.seed)
    half = len(every.images) // 2
    if half < LEAST:
        raise DataRefused(
            f"distribution: the training set holds out {len(every.images)} pictures at {resolution} px and needs "
            f"{2 * LEAST}; curate more, raise data.buckets.validation, or set distribution to null"
        )
    order = np.random.default_rng([config.seed, 73]).permutation(len(every.images))
    asked, others = every.part(order[:half]), every.part(order[half : 2 * half])
    embed, learnt = (
        embedder(config.embedder),
        held(data, resolution, "train", config.caption, config.training, config.seed),
    )
    floor, real = embedded(embed, asked.images), embedded(embed, others.images)
    measured = Measured(config, embed, asked, real, np.concatenate([floor, real]), embedded(embed, learnt.images))
    scores = {REAL: measured.scores(asked.images, floor, trained_on=False)[0]}
    jobs = [Job(folder, asked.captions, config.seed) for folder in checkpoints.values()]
    for place, (stage, images) in enumerate(zip(checkpoints, ctx.fan_out(draw, jobs), strict=True)):
        scores[stage], nearest = measured.scores(images, embedded(embed, images))
        if nearest is not None:
            show_nearest(images, learnt.images, nearest, ctx.out / f"nearest-{stage}.png")
        ctx.progress(place + 1, len(jobs), {})
    about = {"model": embed.name, "features": int(real.shape[1])}
    record: dict[str, Any] = {
        "embedding": about,
        "resolution": resolution,
        "pictures": half,
        "training": len(learnt.images),
        "scores": scores,
    }
    if config.rewards:
        record["models"] = {f"hub_{reward.label}": clip_of(reward).name for reward in config.rewards}
    (ctx.out / "distribution.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    return record


def show_nearest(images: np.ndarray, training: list[np.ndarray], nearest: np.ndarray, path: Path) -> None:
    """The drawn pictures that lie nearest to a training picture, above it, nearest first."""
    closest = np.argsort(nearest[1], kind="stable")[:SHOWN]
    pairs = [(images[i], training[int(nearest[0][i])]) for i in closest]
    sheet = Image.new("RGB", (CELL * len(pairs), 2 * CELL))
    for column, pair in enumerate(pairs):
        for line, picture in enumerate(pair):
            sheet.paste(
                Image.fromarray(picture).resize((CELL, CELL), Image.Resampling.NEAREST), (CELL * column, CELL * line)
            )
    sheet.save(path)

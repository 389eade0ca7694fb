"""Stage function that trains a Bradley-Terry reward model on stored preference pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from infra.errors import DataRefused
from infra.stages import StageContext
from models.engine.distribute import one_thread
from models.engine.loop import train, write_metrics
from models.engine.objective import Batch
from models.engine.randomness import derive_seed, shuffled
from models.engine.weights import put_weights
from models.evaluation.intervals import wilson
from models.networks import text_encoder
from models.networks.discriminator import text_vector
from models.networks.image_encoder import ImageEncoder
from models.posttraining.calibration import calibration_error, temperature
from models.posttraining.config import RewardModelConfig
from models.posttraining.preference_pairs import TRAIN, read_pairs
from models.posttraining.reward_model import IMAGE_DIM, BradleyTerry, RewardModel, Scorer, image_features
from tasks.training_data import to_model

MAX_TOKENS = 64
CHUNK = 64  # pictures encoded at a time


@dataclass(frozen=True)
class Pairs:
    """Features of all pairs, winners as labelled, and which part each prompt fell in."""

    winner: torch.Tensor  # [N, F]
    loser: torch.Tensor  # [N, F]
    text: torch.Tensor  # [N, D]
    part: np.ndarray  # [N] of train, calibrate, report


def part_of(prompt: str, validation: float, seed: int) -> str:
    """By the prompt alone, so that no prompt is on two sides: train, or one half of the validation share."""
    place = derive_seed(seed, "split", prompt) % 10_000 / 10_000
    if place >= validation:
        return "train"
    return "calibrate" if place < validation / 2 else "report"


def open_pairs(config: RewardModelConfig, ctx: StageContext) -> Pairs:
    """Read, refuse what is no preference, encode, turn the planted share round."""
    pairs = read_pairs(ctx.inputs["pairs"]).of(TRAIN)
    prompts = list(pairs.prompts)
    encoder, distinct = ImageEncoder(), list(dict.fromkeys(prompts))
    text = text_vector(*text_encoder.encode(distinct, MAX_TOKENS))
    rows = torch.tensor([distinct.index(prompt) for prompt in prompts])
    winner, loser = (encoded(encoder, side) for side in (pairs.winner, pairs.loser))
    turned = np.random.default_rng([config.train.seed, 79]).random(len(prompts)) < config.label_noise
    swap = torch.from_numpy(turned)[:, None]
    winner, loser = torch.where(swap, loser, winner), torch.where(swap, winner, loser)
    part = np.array([part_of(prompt, config.validation, config.train.seed) for prompt in prompts])
    for name in ("train", "calibrate", "report"):
        if not (part == name).any():
            raise DataRefused(f"pairs: no pair of {len(distinct)} prompts fell in {name!r}; make more pairs")
    return Pairs(winner, loser, text[rows], part)


@torch.no_grad()
def encoded(encoder: ImageEncoder, images: np.ndarray) -> torch.Tensor:
    """Features [N, F] of uint8 [N, H, W, 3]."""
    starts = range(0, len(images), CHUNK)
    return torch.cat([image_features(encoder, to_model(images[start : start + CHUNK])) for start in starts])


def batches_of(pairs: Pairs, size: int, seed: int) -> Callable[[int], Batch]:
    """Training pairs as a pure function of the step: a fresh permutation each epoch."""
    chosen = torch.from_numpy(np.flatnonzero(pairs.part == "train"))

    def batch(step: int) -> Batch:
        rows = chosen[shuffled(seed, "pair order", len(chosen), range(step * size, (step + 1) * size))]
        text = pairs.text[rows][:, None]
        extra = {"winner": pairs.winner[rows], "loser": pairs.loser[rows]}
        return Batch(text, text, torch.ones(len(rows), 1, dtype=torch.bool), tuple(range(size)), extra=extra)

    return batch


def reward_model(config: RewardModelConfig, ctx: StageContext) -> dict[str, Any]:
    """Train, normalise, calibrate on prompts it did not see, report on others it did not see either."""
    with one_thread():
        pairs = open_pairs(config, ctx)
        scorer = Scorer(IMAGE_DIM, pairs.text.shape[1], config.width, config.train.seed)
        chosen = torch.from_numpy(pairs.part == "train")
        scorer.standardise(torch.cat([pairs.winner[chosen], pairs.loser[chosen]]), pairs.text[chosen])
        batches = batches_of(pairs, config.train.batch_size, config.train.seed)
        trainer = train(BradleyTerry(scorer), batches, config.train, ctx.scratch, ctx.progress)
        put_weights(scorer, trainer.emas["scorer"].average)
        with torch.no_grad():
            scores = [scorer(side, pairs.text).numpy() for side in (pairs.winner, pairs.loser)]
    trained = np.concatenate([side[pairs.part == "train"] for side in scores])
    model = RewardModel(scorer, ImageEncoder(), float(trained.mean()), float(trained.std()))
    model.save(ctx.out)
    write_metrics(trainer.rows, ctx.out / "metrics.jsonl")
    margins = {name: (scores[0] - scores[1])[pairs.part == name] for name in ("train", "calibrate", "report")}
    at, right = temperature(margins["calibrate"]), margins["report"] > 0
    return {
        "pairs": {name: len(values) for name, values in margins.items()}, "temperature": at,
        "accuracy": wilson(right), "accuracy_training": float((margins["train"] > 0).mean()),
        "bayes_limit": 1 - config.label_noise, "share_of_limit": float(right.mean()) / (1 - config.label_noise),
        "calibration_error": calibration_error(margins["report"], at),
    }  # fmt: skip

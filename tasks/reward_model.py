"""Stage function that trains a Bradley-Terry reward model on stored preference pairs and captioned pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data_curation.dataset import Batch as Rows
from infra.errors import ConfigError, DataRefused
from infra.stages import StageContext
from models.engine.distribute import one_thread
from models.engine.loop import train
from models.engine.objective import Batch, write_metrics
from models.engine.randomness import Randomness, derive_seed, shuffled
from models.engine.weights import put_weights
from models.evaluation.intervals import wilson
from models.networks import text_encoder
from models.networks.discriminator import text_vector
from models.posttraining.alignment import Neighbours
from models.posttraining.calibration import calibration_error, kept_probability, temperature
from models.posttraining.config import RewardModelConfig
from models.posttraining.preference_pairs import TRAIN, plain, read_pairs
from models.posttraining.reward_model import BradleyTerry, RewardModel, Scorer, small
from tasks.training_data import TrainingData, to_model

MAX_TOKENS = 64
CHUNK = 64  # pictures or captions at a time
LONG_CAPTIONS = 0.3  # share of the captioned pictures
PARTS = ("train", "calibrate", "report")


@dataclass(frozen=True)
class Pairs:
    """All pairs, winners as labelled, and which part each prompt fell in."""

    winner: torch.Tensor  # [N, 3, S, S]
    loser: torch.Tensor  # [N, 3, S, S]
    text: torch.Tensor  # [N, D]
    prompt: torch.Tensor  # [N], equal for pairs of one prompt
    part: np.ndarray  # [N] of train, calibrate, report
    turned: np.ndarray  # [N], whether the label is not the stored one
    kept: np.ndarray  # [N], probability with which it is
    strength: np.ndarray  # [N], of the stored preference


@dataclass(frozen=True)
class Curated:
    """Captioned pictures of the training set."""

    pictures: torch.Tensor  # [M, 3, S, S]
    short: torch.Tensor  # [M], row of the short caption in `text`
    long: torch.Tensor  # [M]
    text: torch.Tensor  # [C, D]


def part_of(prompt: str, validation: float, calibration: float, seed: int) -> str:
    """By the prompt alone, case and whitespace aside, so that none is on two sides: train, or a part of the validation share."""
    place = derive_seed(seed, "split", plain(prompt)) % 10_000 / 10_000
    if place >= validation:
        return "train"
    return "calibrate" if place < validation * calibration else "report"


def open_pairs(config: RewardModelConfig, ctx: StageContext) -> Pairs:
    """Read, refuse what is no preference, bring to size, turn planted labels round."""
    pairs = read_pairs(ctx.inputs["pairs"]).of(TRAIN)
    prompts = list(pairs.prompts)
    distinct = list(dict.fromkeys(prompts))
    number = {prompt: row for row, prompt in enumerate(distinct)}
    rows = torch.tensor([number[prompt] for prompt in prompts])
    winner, loser = (brought_to(config.side, side) for side in (pairs.winner, pairs.loser))
    kept = kept_probability(pairs.strength, config.label_noise, config.label_scale)
    turned = np.random.default_rng([config.train.seed, 79]).random(len(prompts)) >= kept
    swap = torch.from_numpy(turned)[:, None, None, None]
    winner, loser = torch.where(swap, loser, winner), torch.where(swap, winner, loser)
    sides = [part_of(prompt, config.validation, config.calibration, config.train.seed) for prompt in prompts]
    part = np.array(sides)
    for name in PARTS:
        if not (part == name).any():
            raise DataRefused(f"pairs: no pair of {len(distinct)} prompts fell in {name!r}; make more pairs")
    return Pairs(winner, loser, text_of(distinct)[rows], rows, part, turned, kept, pairs.strength)


def open_curated(config: RewardModelConfig, ctx: StageContext) -> Curated:
    """All square pictures of the training split, brought to size, with their captions as the scorer reads them."""
    data = TrainingData(ctx.inputs["data"]).set
    selection = data.select(sorted(set(data.index["resolution"].to_pylist())))
    squares = {bucket: rows for bucket, rows in selection.buckets.items() if bucket[0] == bucket[1]}
    if not squares:
        raise ConfigError(
            f"reward model: no square pictures among buckets {sorted(selection.buckets)} of the training set; "
            "add a resolution with aspects: square, or set reward_model.alignment to 0"
        )
    pictures, short, long = list[torch.Tensor](), list[np.ndarray](), list[np.ndarray]()
    for bucket, rows in squares.items():
        for ids in np.array_split(rows, range(CHUNK, len(rows), CHUNK)):
            found = data.gather(Rows(bucket, selection.positions[ids], ids))
            pictures.append(small(to_model(found.images), config.side))
            short.append(found.short)
            long.append(found.long)
    used, places = np.unique(np.stack([np.concatenate(short), np.concatenate(long)]), return_inverse=True)
    first, second = torch.from_numpy(places.reshape(2, -1))
    return Curated(torch.cat(pictures), first, second, text_of([data.captions[i] for i in used]))


def text_of(captions: Sequence[str]) -> torch.Tensor:
    """Mean tokens [N, D]."""
    parts = [captions[start : start + CHUNK] for start in range(0, len(captions), CHUNK)]
    return torch.cat([text_vector(*text_encoder.encode(part, MAX_TOKENS)) for part in parts])


def brought_to(side: int, images: np.ndarray) -> torch.Tensor:
    """float [N, 3, side, side] in [-1, 1] of uint8 [N, H, W, 3]."""
    starts = range(0, len(images), CHUNK)
    return torch.cat([small(to_model(images[start : start + CHUNK]), side) for start in starts])


def batches_of(pairs: Pairs, curated: Curated | None, config: RewardModelConfig) -> Callable[[int], Batch]:
    """Training pairs, and as many captioned pictures, as a pure function of the step: a fresh permutation each epoch."""
    chosen = torch.from_numpy(np.flatnonzero(pairs.part == "train"))
    size, seed = config.train.batch_size, config.train.seed
    near = None
    if curated is not None and config.near:
        near = Neighbours.of(curated.short, curated.text, config.near)
    drawn = size if near is None else size - size // 2  # the others stand beside these

    def batch(step: int) -> Batch:
        slots = tuple(range(size))
        places = range(step * size, (step + 1) * size)
        rows = chosen[shuffled(seed, "pair order", len(chosen), places)]
        text = pairs.text[rows][:, None]
        extra = {"winner": pairs.winner[rows], "loser": pairs.loser[rows], "prompt": pairs.prompt[rows]}
        if curated is not None:
            ids = shuffled(seed, "curated order", len(curated.pictures), range(step * drawn, (step + 1) * drawn))
            rng = Randomness(seed, step, slots)
            if near is not None:
                ids = torch.cat([ids, near.beside(ids, rng.uniform("near captions", (2,))[:drawn])])[:size]
            long = rng.uniform("long captions") < LONG_CAPTIONS
            asked = torch.where(long, curated.long[ids], curated.short[ids])
            extra |= {"curated": curated.pictures[ids], "captions": curated.text[asked], "caption": curated.short[ids]}
        return Batch(text, text, torch.ones(size, 1, dtype=torch.bool), slots, extra=extra)

    return batch


@torch.no_grad()
def scored(scorer: Scorer, pictures: torch.Tensor, text: torch.Tensor) -> np.ndarray:
    """Scores [N]."""
    device = scorer.text_mean.device
    parts = zip(pictures.split(CHUNK), text.split(CHUNK), strict=True)
    return torch.cat([scorer(seen.to(device), asked.to(device)) for seen, asked in parts]).cpu().numpy()


def reward_model(config: RewardModelConfig, ctx: StageContext) -> dict[str, Any]:
    """Train, normalise, calibrate on prompts it did not see, report on others it did not see either."""
    with one_thread():
        pairs = open_pairs(config, ctx)
        curated = open_curated(config, ctx) if config.alignment else None
        scorer = Scorer(pairs.text.shape[1], config.width, config.features, config.side, config.train.seed)
        chosen = torch.from_numpy(pairs.part == "train")
        scorer.standardise(torch.cat([pairs.text[chosen], *(() if curated is None else (curated.text,))]))
        batches = batches_of(pairs, curated, config)
        alone = round(config.alone * config.train.steps) if config.alignment else 0
        objective = BradleyTerry(scorer, config.alignment, alone)
        trainer = train(objective, batches, config.train, ctx.scratch, ctx.progress)
        put_weights(scorer, trainer.emas["scorer"].average)
        scores = [scored(scorer, side, pairs.text) for side in (pairs.winner, pairs.loser)]
    trained = np.concatenate([side[pairs.part == "train"] for side in scores])
    RewardModel(scorer, float(trained.mean()), float(trained.std())).save(ctx.out)
    write_metrics(trainer.rows, ctx.out / "metrics.jsonl")
    return measured(pairs, scores[0] - scores[1])


def measured(pairs: Pairs, margins: np.ndarray) -> dict[str, Any]:
    """What the margins [N] of the labelled order are worth; the limit is that of the noise planted in the reported labels."""
    parts = {name: pairs.part == name for name in PARTS}
    report = parts["report"]
    right, stored = margins[report] > 0, (margins > 0)[report] != pairs.turned[report]
    strong = pairs.strength[report] >= np.median(pairs.strength[report])
    at, limit = temperature(margins[parts["calibrate"]]), float(np.maximum(pairs.kept, 1 - pairs.kept)[report].mean())
    return {
        "pairs": {name: int(rows.sum()) for name, rows in parts.items()}, "temperature": at,
        "accuracy": wilson(right), "accuracy_training": float((margins[parts["train"]] > 0).mean()),
        "accuracy_before_noise": {"all": wilson(stored), "stronger half": wilson(stored[strong])},
        "bayes_limit": limit, "share_of_limit": float(right.mean()) / limit,
        "calibration_error": calibration_error(margins[report], at),
    }  # fmt: skip

"""Stage `train_judge`: render scenes of the demo vocabulary and train the judge on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from data_curation import scenes as demo
from infra.stages import StageContext, no_progress
from models.evaluation.config import JudgeConfig
from models.evaluation.judge import SIDE, JudgeNetwork, Vocabulary, area_average
from models.evaluation.judge_training import Kind, assemble, calibrate, train_network, with_jpeg

PIECES = 4
WIDE_SIDES = (40, 64, 96, 128)


def random_scenes(count: int, rng: np.random.Generator) -> list[demo.Scene]:
    """Scenes with every layout, object (the new subjects too) and background equally likely."""
    names, backgrounds = tuple(demo.OBJECTS | demo.SUBJECT_OBJECTS), tuple(demo.BACKGROUNDS)
    out = []
    for _ in range(count):
        layout = demo.LAYOUTS[rng.integers(len(demo.LAYOUTS))]
        first, last = (names[i] for i in rng.integers(len(names), size=2))
        pair = (first, last) if layout not in demo.SINGLE_LAYOUTS else (first,)
        out.append(demo.Scene(layout, pair, backgrounds[rng.integers(len(backgrounds))]))
    return out


def draw_wide(scenes: Sequence[demo.Scene], rng: np.random.Generator) -> np.ndarray:
    """Scenes drawn larger and brought to 32 px by area, box or Lanczos averaging, as other stages may do it."""
    out = np.empty((len(scenes), SIDE, SIDE, 3), np.uint8)
    for i, scene in enumerate(scenes):
        side = WIDE_SIDES[rng.integers(len(WIDE_SIDES))]
        picture = demo.draw(scene, side, side, rng)
        match int(rng.integers(3)):
            case 0:
                out[i] = area_average(np.asarray(picture)[None], SIDE)[0]
            case 1:
                out[i] = np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BOX))
            case _:
                out[i] = np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS))
    return out


def draw_random(count: int, seed: int) -> tuple[np.ndarray, list[demo.Scene]]:
    """`count` renders with their scenes; every third one comes from a larger picture."""
    rng = np.random.default_rng([seed, 17])
    scenes = random_scenes(count, rng)
    images = np.empty((count, SIDE, SIDE, 3), np.uint8)
    wide = np.arange(count) % 3 == 2
    plain = [scene for scene, is_wide in zip(scenes, wide, strict=True) if not is_wide]
    images[~wide] = demo.draw_batch(plain, SIDE, seed)
    images[wide] = draw_wide([scene for scene, is_wide in zip(scenes, wide, strict=True) if is_wide], rng)
    return images, scenes


def train_judge(config: JudgeConfig, ctx: StageContext) -> dict[str, Any]:
    """Render the pool in pieces, train both networks side by side, save the judge with its calibration figures."""
    pieces = [(config.pictures // PIECES + (i < config.pictures % PIECES), config.seed, i) for i in range(PIECES)]
    drawn = ctx.fan_out(_draw_piece, pieces)
    images = np.concatenate([pictures for pictures, _ in drawn])
    scenes = [scene for _, part in drawn for scene in part]
    images = with_jpeg(images, config.seed)
    vocabulary = Vocabulary.of(scenes)
    kinds: tuple[Kind, ...] = ("colour", "shape")
    colour, shape = ctx.fan_out(_train_one, [(kind, images, scenes, vocabulary, config) for kind in kinds])
    judge = assemble(colour, shape, vocabulary, config)
    judge.calibration = calibrate(
        judge, *draw_random(config.calibration_pictures, config.seed + 1_000_003), config.seed
    )
    judge.save(ctx.out)
    ctx.progress(1, 1, judge.calibration)
    return {"calibration": judge.calibration, "pictures": config.pictures, "updates": config.updates}


def _draw_piece(piece: tuple[int, int, int]) -> tuple[np.ndarray, list[demo.Scene]]:
    count, seed, number = piece
    return draw_random(count, seed * PIECES + number)


def _train_one(job: tuple[Kind, np.ndarray, list[demo.Scene], Vocabulary, JudgeConfig]) -> JudgeNetwork:
    kind, images, scenes, vocabulary, config = job
    return train_network(kind, images, scenes, vocabulary, config, no_progress)

"""Stage `draw_pictures`: captions of the data that every checkpoint draws with the same noise, beside the pictures they are of.

For data of one's own and foreign models, where no judge says what a picture shows: the page's grid, to be looked at. Captions
of held-out pictures come first; where these are too few, captions that were trained on fill up, and grid.json says which.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
from PIL import Image

from data_curation.dataset import TrainingSet
from infra.stages import StageContext
from tasks.config import PicturesConfig
from tasks.distribution import DATA, REAL, Job, draw, held, resolution_of
from tasks.report_parts import fitted

CELL = 96  # of a checkpoint's strip, px


@dataclass(frozen=True)
class Asked:
    """A caption, its picture uint8 [H, W, 3] and whether that was kept out of training."""

    caption: str
    image: np.ndarray
    held_out: bool


def asked(data: TrainingSet, resolution: int, most: int, seed: int) -> list[Asked]:
    """Distinct captions, held-out ones first."""
    found: dict[str, Asked] = {}
    at_resolution = data.index.filter(pc.equal(data.index["resolution"], resolution))
    splits = set(at_resolution["split"].to_pylist())
    for split in ("validation", "train"):
        if split in splits:
            chosen = held(data, resolution, split, "short", most, seed)
            for caption, image in zip(chosen.captions, chosen.images, strict=True):
                found.setdefault(caption, Asked(caption, image, split == "validation"))
    return ([each for each in found.values() if each.caption] or [*found.values()])[:most]


def draw_pictures(config: PicturesConfig, ctx: StageContext) -> dict[str, Any]:
    """grid.json: captions, seeds and stages; samples/STAGE/N-SEED.png and one strip a stage; `real` are the data's own."""
    data = TrainingSet.open(ctx.inputs[DATA])
    checkpoints = {role: folder for role, folder in ctx.inputs.items() if role != DATA}
    rows = asked(data, resolution_of(data, checkpoints.values()), config.prompts, config.seed)
    prompts, seeds = [row.caption for row in rows], [config.seed + number for number in range(len(rows))]
    jobs = [Job(folder, prompts, config.seed) for folder in checkpoints.values()]
    for place, (stage, images) in enumerate(zip(checkpoints, ctx.fan_out(draw, jobs), strict=True)):
        write(ctx, stage, list(images), seeds)
        ctx.progress(place + 1, len(jobs), {})
    write(ctx, REAL, [row.image for row in rows], seeds)
    held_out = [row.held_out for row in rows]
    record = {"prompts": prompts, "seeds": seeds, "stages": [*checkpoints, REAL], "held_out": held_out}
    (ctx.out / "grid.json").write_text(json.dumps(record, indent=1) + "\n")
    return {"prompts": len(prompts), "held_out": sum(held_out), "checkpoints": len(checkpoints)}


def write(ctx: StageContext, stage: str, images: list[np.ndarray], seeds: list[int]) -> None:
    """One file a picture, and a strip of all of them."""
    folder = ctx.out / "samples" / stage
    folder.mkdir(parents=True)
    strip = Image.new("RGB", (CELL * len(images), CELL), "white")
    for i, (image, seed) in enumerate(zip(images, seeds, strict=True)):
        picture = Image.fromarray(image)
        picture.save(folder / f"{i}-{seed}.png")
        strip.paste(fitted(picture, CELL), (CELL * i, 0))
    strip.save(folder.with_suffix(".png"))

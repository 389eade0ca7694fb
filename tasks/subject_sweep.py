"""Stage function of a sweep: what one subject's adapters of several ranks and lengths do at several weights, as a grid.

Every row is an adapter, every column a weight at which it is merged. Under each cell: how well the subject is drawn (the
judge's strict accuracy of a demo subject, else the closeness to one's own pictures) and the class drift.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from data_curation import scenes as demo
from infra.stages import StageContext
from models.evaluation.judge import SIDE, Judge
from models.networks import families, text_encoder
from models.networks.checkpoint import read_card
from models.personalization import lora_files, lora_import, mixing
from models.personalization.config import SweepGridConfig
from models.personalization.lora import with_changes
from models.personalization.mixing import Part
from models.sampling.generate import Generator
from tasks.config import SubjectConfig
from tasks.evaluate_prompts import SEEDS_APART, Prompts, prompt_set, subject_prompts
from tasks.subject_pictures import own_subject

SHOWN, SCALE, HEAD, SIDEWAYS = 4, 3, 16, 96  # pictures a cell, enlargement, px of a line of text, px left of the rows


@dataclass(frozen=True)
class Cell:
    """One adapter at one weight; the first pictures, uint8 [SHOWN, side, side, 3]."""

    adapter: str
    weight: float
    subject: float
    class_drift: float
    pictures: np.ndarray


def sweep_grid(config: SweepGridConfig, ctx: StageContext) -> dict[str, Any]:
    """Draw and score every adapter at every weight; write grid.png and sweep.json."""
    init, judge = ctx.inputs["init"], Judge.load(ctx.inputs["judge"])
    card = read_card(init)
    base, around = families.load(init / "transformer", card), families.surroundings(init, card)
    weights = lora_files.stock_weights(base.transformer)
    adapters = {name: lora_import.read(ctx.inputs[name] / "adapter", base.transformer, ctx.parents["init"].digest)
                for name in config.adapters}  # fmt: skip
    token = next(iter(adapters.values())).about["trigger"]
    asked, right = question(config, ctx, judge, token, card.side)
    plain = prompt_set("held_out_basic", config.ordinary, config.seed)

    def drawn(changes: Mapping[str, Any], prompts: Prompts) -> np.ndarray:
        return Generator(with_changes(base, changes), card, around=around).sample(prompts.texts, prompts.seeds)

    before, cells = float(judge.score(drawn({}, plain), plain.scenes)["all"].mean()), list[Cell]()
    for name, adapter in adapters.items():
        for weight in config.weights:
            changes = mixing.mix({name: Part(adapter, weight)}, weights).changes
            pictures, own = drawn(changes, asked), judge.score(drawn(changes, plain), plain.scenes)["all"].mean()
            cells.append(Cell(name, weight, right(pictures), 1 - float(own) / max(before, 1e-9), pictures[:SHOWN]))
            ctx.progress(len(cells), len(adapters) * len(config.weights), {})
    rows = [{"adapter": cell.adapter, "weight": cell.weight, config.metric: round(cell.subject, 4),
             "class_drift": round(cell.class_drift, 4)} for cell in cells]  # fmt: skip
    (ctx.out / "sweep.json").write_text(json.dumps(rows, indent=1) + "\n")
    grid(cells, config).save(ctx.out / "grid.png")
    return {"cells": rows, "ordinary_before": before}


def question(
    config: SweepGridConfig, ctx: StageContext, judge: Judge, token: str, side: int
) -> tuple[Prompts, Callable[[np.ndarray], float]]:
    """What is asked for, and how well pictures uint8 [N, side, side, 3] answer it."""
    stage, phrase = config.stage, f"{token} {config.stage.class_word}"
    if stage.folder is None:
        asked = subject_prompts(
            SubjectConfig(scene_object=stage.subject, phrase=phrase, prompts=config.prompts), config.seed
        )
        return asked, lambda pictures: float(judge.score(pictures, asked.scenes)["all"].mean())
    own = own_subject(stage, ctx.inputs["subject"], token, side, text_encoder.modules()[1], 10**6)
    texts = [text.replace("{subject}", phrase) for text in stage.templates]
    texts = [texts[i % len(texts)] for i in range(config.prompts)]
    seeds = tuple((config.seed + 2) * SEEDS_APART + i for i in range(len(texts)))
    real = unit(judge.features(own.images))
    nowhere = demo.Scene("big", (stage.class_word,), "white")  # a folder's subject is in no scene; nobody looks
    return Prompts(tuple(texts), seeds, (nowhere,) * len(texts)), lambda pictures: float(
        (unit(judge.features(pictures)) @ real.T).max(1).mean()
    )


def unit(features: np.ndarray) -> np.ndarray:
    """Rows of length 1."""
    found: np.ndarray = features / (np.linalg.norm(features, axis=1, keepdims=True) + 1e-9)
    return found


def grid(cells: list[Cell], config: SweepGridConfig) -> Image.Image:
    """Adapters downwards, weights to the right, numbers above each cell's pictures."""
    columns = len(config.weights)
    width, height = SHOWN * SIDE * SCALE // 2, SIDE * SCALE // 2 + HEAD
    sheet = Image.new("RGB", (SIDEWAYS + columns * (width + 4), HEAD + len(cells) // columns * (height + 4)), "white")
    pen = ImageDraw.Draw(sheet)
    for place, cell in enumerate(cells):
        row, column = divmod(place, columns)
        x, y = SIDEWAYS + column * (width + 4), HEAD + row * (height + 4)
        if row == 0:
            pen.text((x, 2), f"weight {cell.weight:g}", "black")
        if column == 0:
            pen.text((2, y + height // 2), cell.adapter.removeprefix(f"{config.name}-"), "black")
        pen.text((x, y + 2), f"{config.metric} {cell.subject:.2f}  drift {cell.class_drift:.2f}", "black")
        strip = Image.fromarray(np.concatenate(list(cell.pictures), 1))
        sheet.paste(strip.resize((width, height - HEAD), Image.Resampling.NEAREST), (x, y + HEAD))
    return sheet

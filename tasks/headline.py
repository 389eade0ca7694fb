"""headline.png: the same prompts and noise through the whole life of a model, for the top of a README."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from infra.artifacts import Artifact
from tasks.report_parts import fitted

CELL, GAP, TEXT_WIDTH, HEAD = 128, 8, 236, 58
PAGE, INK, QUIET, RIGHT, WRONG = "#ffffff", "#1c1e22", "#5b5f66", "#166b2e", "#b3261e"
ROWS = 6
LONGEST_PROMPT = 70  # characters; longer ones do not fit beside the pictures
JUDGED = "Held-out prompts, the same noise for every model. Line: green, whole = both judges agree with the prompt; red, broken = not."
PRETRAINED, TUNED, PREFERRED = "pre-trained", "fine-tuned", "preference-tuned"


@dataclass(frozen=True)
class Column:
    """One stage of the grid and what the column is called."""

    stage: str
    title: str
    note: str


def headline(
    folder: Path, scores: Mapping[str, Any], parents: Mapping[str, Artifact], steps: Mapping[str, int], out: Path
) -> bool:
    """Draw it from a folder with grid.json; `steps` are the steps of each checkpoint. False where there is no grid."""
    if not (folder / "grid.json").exists():
        return False
    grid = json.loads((folder / "grid.json").read_text())
    accuracy = {stage: _accuracy(own) for stage, own in scores.items()}
    columns = columns_of(grid["stages"], parents, steps, accuracy, "drawn as asked" if "right" in grid else "as it is")
    own = _subjects(parents)  # only a personalised model knows them
    short = [
        i for i, p in enumerate(grid["prompts"]) if len(p) <= LONGEST_PROMPT and not any(name in p for name in own)
    ]
    rows = [short[i] for i in np.unique(np.linspace(0, len(short) - 1, ROWS).round().astype(int))] if short else []
    if not columns or not rows:
        return False
    _draw(folder, grid, columns, rows).save(out, "PNG", optimize=True)
    return True


def _subjects(parents: Mapping[str, Artifact]) -> list[str]:
    facts = parents["scores"].facts if "scores" in parents else {}
    return [subject["phrase"] for subject in facts.get("config", {}).get("subjects", [])]


def _accuracy(own: Mapping[str, Any]) -> float:
    return float(own.get("prompt_accuracy", {}).get("value", 0.0))


def columns_of(
    stages: Sequence[str], parents: Mapping[str, Artifact], steps: Mapping[str, int], accuracy: Mapping[str, float],
    real: str = "drawn as asked",
) -> list[Column]:  # fmt: skip
    """Data, first pre-training, supervised fine-tuning, preferences, then the most accurate student of each step count."""
    made = {stage: parents[stage].facts.get("function", "") for stage in stages if stage in parents}
    flow = [stage for stage in made if made[stage] == "flow_matching"]
    tuned = [stage for stage in made if made[stage] in ("dpo", "grpo", "nft", "refl")]
    columns = [Column("real", "data", real)] if "real" in stages else []
    columns += [Column("model", "foreign model", "as it came")] if made.get("model") == "import_model" else []
    columns += [Column(flow[0], PRETRAINED, flow[0])] if flow else []
    columns += [Column(flow[-1], TUNED, flow[-1])] if len(flow) > 1 else []
    columns += [Column(tuned[-1], PREFERRED, tuned[-1])] if tuned else []
    students: dict[int, str] = {}
    for stage in (stage for stage in made if made[stage] == "distill" and stage in steps):
        best = students.setdefault(steps[stage], stage)
        if accuracy.get(stage, 0.0) > accuracy.get(best, 0.0):
            students[steps[stage]] = stage
    for count, stage in sorted(students.items(), reverse=True):
        columns.append(Column(stage, f"{count} step{'s' if count > 1 else ''}", stage))
    return columns


def _draw(folder: Path, grid: Mapping[str, Any], columns: Sequence[Column], rows: Sequence[int]) -> Image.Image:
    pitch = CELL + GAP
    size = (TEXT_WIDTH + len(columns) * pitch + GAP, HEAD + len(rows) * pitch + 34)
    page = Image.new("RGB", size, PAGE)
    pen, large, small = ImageDraw.Draw(page), ImageFont.load_default(17), ImageFont.load_default(15)
    for x, column in enumerate(columns):
        middle = TEXT_WIDTH + x * pitch + CELL // 2
        pen.text((middle, 10), column.title, INK, large, anchor="ma")
        pen.text((middle, 33), column.note, QUIET, small, anchor="ma")
    for y, row in enumerate(rows):
        top = HEAD + y * pitch
        words = textwrap.wrap(grid["prompts"][row], 27)
        pen.multiline_text((GAP, top + CELL // 2), "\n".join(words), INK, large, anchor="lm", spacing=5)
        for x, column in enumerate(columns):
            left = TEXT_WIDTH + x * pitch
            path = folder / "samples" / column.stage / f"{row}-{grid['seeds'][row]}.png"
            with Image.open(path) as opened:
                page.paste(fitted(opened, CELL), (left, top))
            if "right" in grid:
                _mark(pen, left, top + CELL, grid["right"][column.stage][row])
    text = JUDGED if "right" in grid else "Captions of the data, the same noise for every model."
    pen.text((GAP, size[1] - 26), text, QUIET, small)
    return page


def _mark(pen: ImageDraw.ImageDraw, left: int, top: int, right: bool) -> None:
    """A whole green or a broken red line, so that it does not depend on colour alone."""
    parts = [(0, CELL)] if right else [(x, x + 12) for x in range(0, CELL, 20)]
    for start, end in parts:
        pen.rectangle((left + start, top, left + min(end, CELL) - 1, top + 3), RIGHT if right else WRONG)

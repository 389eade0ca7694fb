"""GenEval's rules (Ghosh et al. 2023, arXiv:2310.11513, sec. 3; evaluate_images.py at 16f1681) on found objects.

A picture is right when every `include` clause holds and no `exclude` clause does. Of a class's objects above the confidence
the `count` surest are taken: there must be that many, all of the asked colour, and each in the asked relation to each
object of an earlier clause. A relation is read from box centres: the offset, shortened by a tenth of the sum of both
boxes' sides, must make up more than half of the unshortened offset's length. The limits are the published
evaluator's: confidence .3, .9 for prompts tagged `counting`, at most 16 objects a class, no suppression of overlaps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
COUNTING = "counting"
MARGIN = 0.1  # of the sum of both boxes' sides
MOST_OBJECTS = 16
Box = tuple[float, float, float, float]  # x_0, y_0, x_1, y_1 in pixels


@dataclass(frozen=True)
class Found:
    """One object that a detector saw; the mask bool [H, W] is there where the detector makes one."""

    name: str
    score: float
    box: Box
    mask: np.ndarray | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Clause:
    """So many of a class; `position`: relation to the objects of the include clause of that number."""

    name: str
    count: int
    colour: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True)
class Prompt:
    """One line of GenEval's metadata."""

    text: str
    tag: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()

    @property
    def names(self) -> set[str]:
        """Every class it speaks of."""
        return {clause.name for clause in (*self.include, *self.exclude)}

    @property
    def asks_colour(self) -> bool:
        """Whether a clause asks for one."""
        return any(clause.colour is not None for clause in self.include)


NameColours = Callable[[Sequence[Found], str], list[str]]  # objects of a class, the class -> their colours


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts of a JSONL file in GenEval's form; ValueError names file, line and what is wrong with it."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); give a JSONL file of GenEval's form") from error
    found = []
    for number, line in zip(count(1), lines, strict=False):
        if not line.strip():
            continue
        try:
            found.append(_prompt(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ValueError(
                f"{path} line {number}: {what}; a line is "
                '{"prompt": ..., "tag": ..., "include": [{"class": ..., "count": ...}]}'
            ) from error
    if not found:
        raise ValueError(f"{path} holds no prompt; give a JSONL file of GenEval's form")
    return found


def _prompt(row: dict[str, Any]) -> Prompt:
    include = tuple(_clause(item, place) for place, item in enumerate(row["include"]))
    exclude = tuple(_clause(item, 0) for item in row.get("exclude", ()))
    prompt = Prompt(row["prompt"], row["tag"], include, exclude)
    if not prompt.text or not prompt.tag or not (include or exclude):
        raise ValueError("prompt, tag or both clause lists are empty")
    return prompt


def _clause(item: dict[str, Any], place: int) -> Clause:
    number, colour, position = item["count"], item.get("color"), item.get("position")
    if not isinstance(number, int) or number < 1:
        raise ValueError(f"count {number!r} is not a number of 1 or more")
    if colour is not None and colour not in COLOURS:
        raise ValueError(f"color {colour!r} is none of {', '.join(COLOURS)}")
    if position is not None:
        relation, target = position
        if relation not in RELATIONS or not isinstance(target, int) or not 0 <= target < place:
            raise ValueError(f"position {position!r} is not one of {RELATIONS} and the number of an earlier clause")
        position = (relation, target)
    return Clause(item["class"], number, colour, position)


def surest(found: Sequence[Found], above: float, max_overlap: float = 1.0) -> dict[str, list[Found]]:
    """Class -> its objects of a score above the limit, surest first, at most 16, less those that overlap a surer one."""
    kept: dict[str, list[Found]] = {}
    for each in sorted((f for f in found if f.score > above), key=lambda f: -f.score):
        kept.setdefault(each.name, []).append(each)
    return {name: _apart(objects[:MOST_OBJECTS], max_overlap) for name, objects in kept.items()}


def _apart(objects: list[Found], max_overlap: float) -> list[Found]:
    kept: list[Found] = []
    for each in objects:
        if max_overlap >= 1 or all(overlap(each.box, other.box) < max_overlap for other in kept):
            kept.append(each)
    return kept


def overlap(a: Box, b: Box) -> float:
    """Intersection over union."""
    across, down = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inside = max(0.0, across) * max(0.0, down)
    both = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - inside
    return inside / both if both > 0 else 0.0


def relations(a: Box, b: Box) -> set[str]:
    """What is true of a to b: of left of, right of, above, below; none when they are too near or on a slant."""
    offset = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    margins = [MARGIN * (abs(a[i + 2] - a[i]) + abs(b[i + 2] - b[i])) for i in (0, 1)]
    beyond = [math.copysign(max(abs(o) - m, 0.0), o) for o, m in zip(offset, margins, strict=True)]
    if max(abs(each) for each in beyond) < 1e-3:
        return set()
    across, down = (each / math.hypot(*offset) for each in beyond)
    true = {"left of": across < -0.5, "right of": across > 0.5, "above": down < -0.5, "below": down > 0.5}
    return {name for name, holds in true.items() if holds}


def answer(prompt: Prompt, objects: Mapping[str, Sequence[Found]], colours_of: NameColours) -> list[str]:
    """What is wrong with a picture that shows these objects, surest first within their class; nothing: it is right."""
    faults, groups = list[str](), list[Sequence[Found] | None]()
    for clause in prompt.include:
        taken = list(objects.get(clause.name, ()))[: clause.count]
        fault = _fault(clause, taken, groups, colours_of)
        groups.append(None if fault else taken)
        faults += [fault] if fault else []
    for clause in prompt.exclude:
        number = len(objects.get(clause.name, ()))
        if number >= clause.count:
            faults.append(f"expected fewer than {clause.count} {clause.name}, found {number}")
    return faults


def _fault(clause: Clause, taken: list[Found], groups: list[Sequence[Found] | None], colours_of: NameColours) -> str:
    if len(taken) < clause.count:
        return f"expected {clause.count} {clause.name}, found {len(taken)}"
    if clause.colour is not None:
        seen = colours_of(taken, clause.name)
        if seen.count(clause.colour) < clause.count:
            return f"expected {clause.count} {clause.colour} {clause.name}, found {', '.join(seen)}"
    if clause.position is None:
        return ""
    relation, number = clause.position
    target = groups[number]
    if target is None:
        return f"nothing for {clause.name} to be {relation}"
    held = [relations(each.box, other.box) for each in taken for other in target]
    wrong = next((true for true in held if relation not in true), None)
    if wrong is None:
        return ""
    return f"expected {clause.name} {relation} its target, found {' and '.join(sorted(wrong)) or 'neither side'}"

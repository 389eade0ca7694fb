"""What a prompt asks for, question by question (GenEval, arXiv:2310.11513): objects, count, position, colour.

A prompt may leave things open: "a cat" asks for a cat and nothing else, wherever it stands. A picture answers a
category right when its objects and that category's question are right (GenEval's strict form). The judge's networks
stand in for GenEval's detector; any function that names what a picture shows can take their place, such as
`arranged` on what a detector found (`evaluate.detector`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from models.evaluation.geneval import Found, relations
from models.evaluation.judge import PAIRS, Judge, SceneLike

Category = Literal["single_object", "two_objects", "counting", "colour", "position"]
CATEGORIES: tuple[Category, ...] = ("single_object", "two_objects", "counting", "colour", "position")
THREE = "three"
CENTRED = "big"


@dataclass(frozen=True)
class Asked:
    """What must be seen; None leaves it open. `ordered`: the first object must be the left or upper one."""

    objects: tuple[str, ...]
    count: int | None = None
    layout: str | None = None
    background: str | None = None
    ordered: bool = False

    @classmethod
    def of(cls, scene: SceneLike) -> Asked:
        """Everything a whole scene asks."""
        return cls(scene.objects, _count(scene.layout), scene.layout, scene.background, scene.layout in PAIRS)

    @property
    def categories(self) -> tuple[Category, ...]:
        """The categories this prompt belongs to."""
        several = self.count is not None and self.count > 1 and len(set(self.objects)) == 1
        found: list[Category] = ["counting" if several else "two_objects" if len(self.objects) > 1 else "single_object"]
        if self.background is not None:
            found.append("colour")
        if self.layout is not None and self.layout not in (THREE, CENTRED):
            found.append("position")
        return tuple(found)


@dataclass(frozen=True)
class Seen:
    """What one picture shows, as named by whoever looked at it."""

    objects: tuple[str, ...]  # in reading order
    layout: str
    background: str
    accepted: bool  # False: no drawing of anything
    number: int | None = None  # of things, where they were counted; None: as many as the layout holds

    @property
    def count(self) -> int:
        """Number of things."""
        return _count(self.layout) if self.number is None else self.number


def _count(layout: str) -> int:
    return 3 if layout == THREE else 2 if layout in PAIRS else 1


def seen(judge: Judge, images: np.ndarray) -> list[Seen]:
    """What the judge sees in pictures uint8 [N, S, S, 3]; an object counts when colour and outline agree on it."""
    colour, shape = judge.logits(images)
    limit, names = judge.settings["reject_above"], judge.vocabulary
    accepted = torch.stack([torch.sigmoid(part["reject"][:, 0]) <= limit for part in (colour, shape)]).all(0)
    layouts, backgrounds = colour["layout"].argmax(1), colour["background"].argmax(1)
    pairs = [[part[head].argmax(1) for part in (colour, shape)] for head in ("object_1", "object_2")]
    out = []
    for i in range(len(images)):
        layout = names.layouts[int(layouts[i])]
        heads = pairs if layout in PAIRS else pairs[:1]
        agreed = tuple(names.objects[int(a[i])] if a[i] == b[i] else "?" for a, b in heads)
        out.append(Seen(agreed, layout, names.backgrounds[int(backgrounds[i])], bool(accepted[i])))
    return out


def arranged(objects: Sequence[Found], size: tuple[int, int], background: str) -> Seen:
    """What a picture of this width and height shows, told from the boxes of its objects.

    One object is `big` where its centre is in the middle third of both sides, else in the corner of its quarter; two are
    `beside` or `above` by GenEval's relation of their boxes; any other arrangement has no name and is never right.
    """
    placed = sorted(objects, key=lambda each: (each.box[0] + each.box[2], each.box[1] + each.box[3]))
    layout = ""
    if len(placed) == 1:
        x, y = ((placed[0].box[i] + placed[0].box[i + 2]) / 2 / size[i] for i in (0, 1))
        central = max(abs(x - 0.5), abs(y - 0.5)) < 1 / 6
        layout = CENTRED if central else f"{'top' if y < 0.5 else 'bottom'} {'left' if x < 0.5 else 'right'}"
    elif len(placed) == 2:
        held = relations(placed[0].box, placed[1].box)
        layout = next((name for name, word in (("beside", "left of"), ("above", "above")) if word in held), "")
        if "below" in held and not layout:
            layout, placed = "above", placed[::-1]
    elif len(placed) == 3:
        layout = THREE
    return Seen(tuple(each.name for each in placed), layout, background, bool(placed), len(placed))


def answered(asked: Asked, picture: Seen) -> dict[str, bool]:
    """Each question the prompt asks, and `all` of them."""
    same = picture.objects == asked.objects if asked.ordered else sorted(picture.objects) == sorted(asked.objects)
    if len(set(asked.objects)) == 1 and not asked.ordered:
        same = set(picture.objects) == set(asked.objects)  # "two cats" are seen as two objects, three as one
    questions = {"objects": picture.accepted and same}
    if asked.count is not None:
        questions["count"] = picture.count == asked.count
    if asked.background is not None:
        questions["colour"] = picture.background == asked.background
    if asked.layout is not None:
        questions["position"] = picture.layout == asked.layout
    return questions | {"all": all(questions.values())}


def by_category(asked: Sequence[Asked], pictures: Sequence[Seen]) -> dict[str, np.ndarray]:
    """Category -> right or not [n] for the prompts that belong to it, and `all` for every prompt."""
    if len(asked) != len(pictures):
        raise ValueError(f"{len(asked)} prompts but {len(pictures)} pictures; give one prompt per picture")
    question = {"single_object": "objects", "two_objects": "objects", "counting": "count", "colour": "colour",
                "position": "position"}  # fmt: skip
    found: dict[str, list[bool]] = {"all": []}
    for wanted, picture in zip(asked, pictures, strict=True):
        answers = answered(wanted, picture)
        found["all"].append(answers["all"])
        for category in wanted.categories:
            found.setdefault(category, []).append(answers["objects"] and answers[question[category]])
    return {name: np.array(values, bool) for name, values in found.items()}

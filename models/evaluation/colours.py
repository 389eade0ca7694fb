"""Colours by zero-shot CLIP, as GenEval names them (arXiv:2310.11513, sec. 3.2): the crop of an object, what is not it in grey.

The text side is the mean of three templates' features, each and the mean at length 1 (Radford et al. 2021, sec. 3.1.4).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from models.evaluation.clip import Clip
from models.evaluation.geneval import COLOURS, Found

TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
GROUND = ("a picture on a {colour} background", "a drawing on a {colour} background", "a {colour} background")
BLANK = (0x99, 0x99, 0x99)


class Colours:
    """Names colours; the text features of a class are made once."""

    def __init__(self, clip: Clip) -> None:
        self.clip = clip
        self._words: dict[tuple[object, ...], torch.Tensor] = {}

    def of_objects(self, image: Image.Image, objects: Sequence[Found], name: str) -> list[str]:
        """The colour of each object of a class in its picture."""
        if not objects:
            return []
        crops = self.clip.of_images([crop(image, each) for each in objects])
        return self._nearest(crops, TEMPLATES, COLOURS, name)

    def of_grounds(self, images: Sequence[Image.Image], colours: Sequence[str]) -> list[str]:
        """The colour that each picture is on, one of those given."""
        return self._nearest(self.clip.of_images(images), GROUND, colours, "")

    def _nearest(self, seen: torch.Tensor, templates: Sequence[str], colours: Sequence[str], name: str) -> list[str]:
        key = (*templates, *colours, name)
        if key not in self._words:
            texts = [template.format(colour=colour, name=name) for colour in colours for template in templates]
            each = self.clip.texts(texts).unflatten(0, (len(colours), len(templates)))
            self._words[key] = F.normalize(each.mean(1), dim=-1)
        return [colours[int(i)] for i in (seen @ self._words[key].T).argmax(1)]


def crop(image: Image.Image, each: Found) -> Image.Image:
    """The box of an object; pixels that are not the object's grey, where its mask is known."""
    if each.mask is not None:
        blank = Image.new("RGB", image.size, BLANK)
        image = Image.composite(image, blank, Image.fromarray(np.asarray(each.mask, bool)))
    left, top, right, bottom = (round(value) for value in each.box)
    left, top = min(left, image.width - 1), min(top, image.height - 1)
    return image.crop((left, top, max(left + 1, right), max(top + 1, bottom)))

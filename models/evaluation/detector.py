"""Objects of a picture by a model of transformers: an instance segmenter (GenEval's is Mask2Former Swin-S on COCO), a closed
detector (DETR's kind), or one that is told the names to look for (OWL-ViT, OWLv2).

Mask2Former's post-processing in transformers puts masks on a grid of 384 x 384 places whatever the picture's size, so their boxes
are exact to a cell of it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from infra.errors import ConfigError
from infra.hub_models import Loaded, load, pinned, reading, refuse_type
from models.evaluation.config import CLOSED, OPEN, SEGMENTERS, DetectorConfig
from models.evaluation.geneval import Box, Found

ALSO = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}  # COCO's names, GenEval's
WANTED = f"a folder with safetensors of one of {', '.join((*SEGMENTERS, *CLOSED, *OPEN))}"
ROLE = "detector"
QUERY = "a photo of a {}"


@functools.lru_cache(maxsize=1)
def detector(config: DetectorConfig) -> Detector:
    """The detector that a configuration asks for, loaded once a process."""
    return Detector(config)


class Detector:
    """Pictures in, objects with name, score, box and (of a segmenter) mask out."""

    def __init__(self, config: DetectorConfig) -> None:
        from transformers import AutoConfig

        with reading(ROLE, config.model, WANTED):
            self.kind = AutoConfig.from_pretrained(config.model, **pinned(config)).model_type
            refuse_type(config.model, self.kind, DetectorConfig.types)
        found = _loaded(config, self.kind)
        self.config, self.name = config, found.name
        self._model, self._processor, self._device = found.model.float(), found.processor, found.device
        self._labels = [] if self.kind in OPEN else _labels(found.model.config.id2label)

    def refuse_unknown(self, names: Sequence[str]) -> None:
        """ConfigError for a class that the model has not learnt, or a name that is too long for one that is told them."""
        if self.kind in OPEN:
            most = self._processor.tokenizer.model_max_length
            long = [name for name in names if len(self._processor.tokenizer(QUERY.format(name))["input_ids"]) > most]
            if long:
                raise ConfigError(
                    f"detector {self.config.model} reads {most} tokens, {long[0]!r} has more; ask for a shorter name"
                )
            return
        unknown = sorted(set(names) - set(self._labels))
        if unknown:
            raise ConfigError(
                f"detector {self.config.model} does not know {', '.join(unknown[:5])} ({len(unknown)} of {len(set(names))} "
                f"names asked; it knows {len(self._labels)}); ask for others, or take one of {', '.join(OPEN)}"
            )

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], names: Sequence[str], above: float) -> list[list[Found]]:
        """Objects of these names with a score of `above` or more, picture by picture; boxes in the picture's pixels."""
        self.refuse_unknown(names)
        size, wanted = self.config.batch_size, set(names)
        parts = [self._batch(images[at : at + size], list(names), above) for at in range(0, len(images), size)]
        return [[found for found in picture if found.name in wanted] for part in parts for picture in part]

    def _batch(self, images: Sequence[Image.Image], names: list[str], above: float) -> list[list[Found]]:
        asked = {"text": [[QUERY.format(name) for name in names]] * len(images)} if self.kind in OPEN else {}
        inputs = self._processor(images=list(images), return_tensors="pt", **asked).to(self._device)
        answer, sizes = self._model(**inputs), [(image.height, image.width) for image in images]
        fields = (
            ("class_queries_logits", "masks_queries_logits") if self.kind in SEGMENTERS else ("logits", "pred_boxes")
        )
        outputs = SimpleNamespace(**{name: getattr(answer, name).float().cpu() for name in fields})
        if self.kind in SEGMENTERS:
            post = self._processor.post_process_instance_segmentation
            results = post(outputs, threshold=above, target_sizes=sizes, return_binary_maps=True)
            return [self._segments(result) for result in results]
        ask = "post_process_grounded_object_detection" if self.kind in OPEN else "post_process_object_detection"
        results = getattr(self._processor, ask)(outputs, threshold=above, target_sizes=sizes)
        return [self._boxes(result, names if self.kind in OPEN else self._labels) for result in results]

    def _segments(self, result: dict[str, Any]) -> list[Found]:
        found = []
        for info in result["segments_info"]:
            mask = result["segmentation"][info["id"]].numpy().astype(bool)
            found.append(Found(self._labels[info["label_id"]], float(info["score"]), around(mask), mask))
        return found

    def _boxes(self, result: dict[str, Any], names: Sequence[str]) -> list[Found]:
        rows = zip(result["scores"].tolist(), result["labels"].tolist(), result["boxes"].tolist(), strict=True)
        return [
            Found(names[label], score, (box[0], box[1], box[2], box[3]))
            for score, label, box in rows
            if label < len(names)
        ]


def around(mask: np.ndarray) -> Box:
    """The box of a mask bool [H, W] with a true place; right and lower edge are those of the pixels."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def _loaded(config: DetectorConfig, kind: str) -> Loaded:
    import transformers as hf

    if kind in SEGMENTERS:
        return load(ROLE, config, hf.AutoModelForUniversalSegmentation, hf.AutoImageProcessor, WANTED, use_fast=False)
    if kind in CLOSED:
        return load(ROLE, config, hf.AutoModelForObjectDetection, hf.AutoImageProcessor, WANTED, use_fast=False)
    return load(ROLE, config, hf.AutoModelForZeroShotObjectDetection, hf.AutoProcessor, WANTED, use_fast=False)


def _labels(by_number: dict[int, str]) -> list[str]:
    """Names by class number; numbers between that have none (COCO's gaps) are empty."""
    names = [""] * (max(by_number) + 1)
    for number, name in by_number.items():
        names[number] = ALSO.get(name.lower(), name.lower())
    return names

"""The pictures of a subject as DreamBooth trains on them: squares of the model's side, captions that name the subject."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageOps
from transformers import PreTrainedTokenizerBase

from data_curation import scenes as demo
from data_curation.decode import open_picture
from data_curation.subject import PICTURES
from infra.errors import ConfigError, DataRefused
from models.engine.randomness import derive_seed
from models.personalization.config import DreamBoothConfig
from models.personalization.rare_token import words_of

INSTANCE_SCENES = (
    ("big", "white"), ("top left", "pink"), ("big", "blue"), ("bottom right", "green"), ("three", "gray"),
    ("big", "black"), ("top right", "white"), ("bottom left", "blue"),
)  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """Pictures uint8 [N, side, side, 3], a caption for each, and where the subject is (0 to 1), if any has a mask."""

    images: np.ndarray
    captions: list[str]
    masks: np.ndarray | None = None  # float32 [N, side, side]; 1 everywhere in a picture without one


def demo_subject(config: DreamBoothConfig, token: str, side: int) -> Subject:
    """A few drawn scenes with an object that no published picture shows."""
    if config.subject not in demo.SUBJECT_OBJECTS:
        raise ConfigError(
            f"personalize subject {config.subject!r} is unknown; choose one of {sorted(demo.SUBJECT_OBJECTS)}, "
            "or a folder of pictures, written with a slash"
        )
    chosen = config.scenes or INSTANCE_SCENES
    for layout, color in chosen:
        if layout not in demo.SINGLE_LAYOUTS or color not in demo.BACKGROUNDS:
            raise ConfigError(
                f"{config.name}: there is no scene of one object {layout!r} on {color!r}; "
                f"layouts are {', '.join(demo.SINGLE_LAYOUTS)}, backgrounds {', '.join(demo.BACKGROUNDS)}"
            )
    places = [chosen[i % len(chosen)] for i in range(config.pictures)]
    scenes = [demo.Scene(layout, (config.subject,), color) for layout, color in places]
    images = demo.draw_batch(scenes, side, seed=derive_seed(config.train.seed, "instance") % 2**31)
    phrase = f"{token} {config.class_word}"
    return Subject(images, [demo.short_caption(scene).replace(config.subject, phrase) for scene in scenes])


def own_subject(
    config: DreamBoothConfig, folder: Path, token: str, side: int, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> Subject:
    """What read_subject stored; the middle square of each picture, scaled to the side."""
    rows = pq.read_table(folder / PICTURES, page_checksum_verification=True).to_pylist()
    phrase, captions = f"{token} {config.class_word}", []
    for number, row in enumerate(rows):
        written = row["caption"] or config.templates[number % len(config.templates)]
        caption = written.replace("{subject}", phrase)
        if not set(token.lower().split()) <= words_of([caption]):
            raise DataRefused(
                f"the caption of {row['name']}, {written!r}, does not name the subject; "
                f"write {{subject}} where it stands, or the token {token!r} before its class"
            )
        length = len(tokenizer(caption)["input_ids"])
        if length > max_tokens:
            raise DataRefused(
                f"the caption of {row['name']} has {length} tokens, more than the model reads ({max_tokens}); shorten it"
            )
        captions.append(caption)
    images = np.stack([_square(row["image"], side) for row in rows])
    if not any(row.get("mask") for row in rows):
        return Subject(images, captions)
    whole = np.ones((side, side), np.float32)
    masks = [_square(row["mask"], side).mean(2, dtype=np.float32) / 255 if row["mask"] else whole for row in rows]
    return Subject(images, captions, np.stack(masks))


def _square(stored: bytes, side: int) -> np.ndarray:
    """The middle square of a stored picture, scaled, uint8 [side, side, 3]."""
    return np.asarray(ImageOps.fit(open_picture(stored), (side, side), Image.Resampling.LANCZOS))

